"""A Llava for what transformers' own can't express: other connectors, feature maps, heads with more than a product."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
)
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel

from ..knockout.model.architecture import scaled_logits
from .connectors import OWN


@strict
class LlavaFactoryConfig(LlavaConfig):
    """
    A `LlavaConfig` with further connectors, and with a bias of the head.

    Args:
        connector (`str`, *optional*, defaults to `"mlp2x_gelu"`):
            Name of the connector; see [`peft_ext.factory.connectors`].
        connector_config (`dict`, *optional*):
            Options of the connector: `factor` of `pixel_shuffle`; `queries` of `resampler` and `qformer`, and the
            options of their classes in transformers.
        lm_head_bias (`bool`, *optional*, defaults to `False`):
            Whether the language model's head has a bias, as Phi-2's has.
    """

    model_type = "llava_factory"

    connector: str = "mlp2x_gelu"
    connector_config: dict[str, Any] | None = None
    lm_head_bias: bool = False


class Head(nn.Linear):
    """A language model's head: bias, factor and soft cap of the logits as the text configuration says."""

    scales_logits = True  # for knockouts, which scale the logits of transformers' models themselves

    def __init__(self, text_config: Any, bias: bool) -> None:
        super().__init__(text_config.hidden_size, text_config.vocab_size, bias=bias)
        self.text_config = text_config

    def forward(self, hidden: Tensor) -> Tensor:
        return scaled_logits(super().forward(hidden), self.text_config)


class LlavaFactoryModel(LlavaModel):
    """Vision tower, connector and decoder."""

    config_class = LlavaFactoryConfig

    def __init__(self, config: LlavaFactoryConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = OWN[config.connector][0](config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()


class LlavaFactoryForConditionalGeneration(LlavaForConditionalGeneration):
    """
    A vision-language model that transformers' `LlavaForConditionalGeneration` can't express, made by [`compose`].

    `AutoModelForImageTextToText` loads it after `import peft_ext.factory`.

    Args:
        config ([`LlavaFactoryConfig`]):
            Configuration of the model.
    """

    config_class = LlavaFactoryConfig

    def __init__(self, config: LlavaFactoryConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = LlavaFactoryModel(config)
        self.lm_head = Head(config.text_config, config.lm_head_bias)
        self.post_init()


AutoConfig.register("llava_factory", LlavaFactoryConfig)
AutoModelForImageTextToText.register(LlavaFactoryConfig, LlavaFactoryForConditionalGeneration)
