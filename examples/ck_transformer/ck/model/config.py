"""Configs of the classifier and of the fact search."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .encoders import ENCODERS
from .losses import CLASSIFIER_LOSSES, SEARCH_LOSSES


VARIANTS = ("multimodal", "text")


def choice(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}.")


class RegionEncoderConfig(PreTrainedConfig):
    """
    What both models share: a vision-language encoder and the width of the region features.

    Args:
        encoder_config (`PreTrainedConfig` or `dict`):
            Config of VisualBERT, LXMERT or ViLT, as a dict with its `model_type`. The size of its visual input is set
            from `feature_size`.
        feature_size (`int`, *optional*, defaults to 2048): Width of a region feature V.
        initializer_range (`float`, *optional*): Deviation of new weights, by default the encoder's.
    """

    encoder_config: Any = None
    feature_size: int = 2048
    initializer_range: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.encoder_config is None:
            self.encoder_config = {"model_type": "visual_bert"}
        if isinstance(self.encoder_config, PreTrainedConfig):
            self.encoder_config = self.encoder_config.to_dict()
        choice("encoder_config['model_type']", self.encoder_config.get("model_type", ""), ENCODERS)
        if self.initializer_range is None:
            self.initializer_range = self.encoder_config.get("initializer_range", 0.02)
        super().__post_init__(**kwargs)

    def make_encoder(self) -> Any:
        """The encoder, with random weights."""
        values = dict(self.encoder_config)
        encoder = ENCODERS[values.pop("model_type")]
        encoder.set_feature_size(values, self.feature_size)
        return encoder(AutoConfig.for_model(self.encoder_config["model_type"], **values))

    @property
    def hidden_size(self) -> int:
        return AutoConfig.for_model(**self.encoder_config).hidden_size


class CKTransformerConfig(RegionEncoderConfig):
    """
    Config of [`CKTransformer`].

    Args:
        num_blocks (`int`, *optional*, defaults to 2): M, the integration blocks.
        num_heads (`int`, *optional*, defaults to 12): Attention heads of a block.
        intermediate_size (`int`, *optional*): Width of a block's feed-forward layer, four times the hidden size.
        dropout (`float`, *optional*, defaults to 0.1): Dropout of the blocks.
        loss (`str`, *optional*, defaults to `"cross_entropy"`): The thesis's, or `"margin"`, a hinge on the scores.
        rows_per_chunk (`int`, *optional*): Texts that are encoded at a time, by default all of a batch.
    """

    model_type = "ck_transformer"

    num_blocks: int = 2
    num_heads: int = 12
    intermediate_size: int | None = None
    dropout: float = 0.1
    loss: str = "cross_entropy"
    rows_per_chunk: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        choice("loss", self.loss, CLASSIFIER_LOSSES)
        if self.num_blocks < 1:
            raise ValueError(f"num_blocks={self.num_blocks} must be at least 1.")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide the encoder's hidden size, {self.hidden_size}.")


class FactSearchConfig(RegionEncoderConfig):
    """
    Config of [`FactSearch`].

    Args:
        variant (`str`, *optional*, defaults to `"multimodal"`):
            What the search sees of an image: its regions, or with `"text"` one region with the mean of all features.
        loss (`str`, *optional*, defaults to `"mse"`):
            Between cosine and target (the thesis names none): `"mse"`, or `"hinge"`, torch's `CosineEmbeddingLoss`.
    """

    model_type = "ck_fact_search"

    variant: str = "multimodal"
    loss: str = "mse"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        choice("variant", self.variant, VARIANTS)
        choice("loss", self.loss, SEARCH_LOSSES)
