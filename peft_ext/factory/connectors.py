"""Connectors between a vision tower and a language model, by name."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.activations import ACT2FN
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler


# Connectors that transformers' own Llava classes express, by the activation between their two linear layers.
# `linear` is the second: no activation, and a second layer that is the identity and stays frozen.
NATIVE = {"mlp2x_gelu": "gelu", "mlp2x_relu": "relu", "mlp2x_silu": "silu", "linear": "linear"}


def vision_width(config: Any) -> int:
    """
    Size of a vision tower's features.

    Raises:
        `ValueError`: if the configuration does not say it.
    """
    size = getattr(config, "hidden_size", None)
    if not isinstance(size, int):
        sizes = getattr(config, "hidden_sizes", None) or [None]
        size = sizes[-1]
    if not isinstance(size, int):
        raise ValueError(
            f"vision_tower: a {config.model_type} configuration has neither `hidden_size` nor `hidden_sizes`, so the "
            "connector's input size is unknown. Use a tower with patch features, such as CLIP, SigLIP or DINOv2."
        )
    return size


def tokens_of(features: Tensor) -> Tensor:
    """Feature maps `[batch, D, height, width]` as tokens `[batch, height·width, D]`; tokens as they are."""
    return features.flatten(2).transpose(1, 2) if features.dim() == 4 else features


class Connector(nn.Module):
    """
    Base of the connectors that transformers' Llava lacks, made from a configuration with `vision_config`,
    `text_config` and `connector_config`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.vision_width, self.text_width = vision_width(config.vision_config), config.text_config.hidden_size

    @staticmethod
    def count(tokens: int, options: dict[str, Any]) -> int:
        """Number of tokens that the language model sees of an image with `tokens` patches: its own queries, if any."""
        return options.get("queries", tokens)


class Identity(Connector):
    """
    Features as they are: for a tower that is trained into the language model's space.

    Raises:
        `ValueError`: if the tower's features are not of the language model's size.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.vision_width != self.text_width:
            raise ValueError(
                f"connector='identity' leaves features of size {self.vision_width} as they are, but the language "
                f"model's embeddings have size {self.text_width}; use 'linear'."
            )

    def forward(self, features: Tensor) -> Tensor:
        return tokens_of(features)


class Perceptron(Connector):
    """One or two linear layers, for towers whose features are maps (ConvNeXt), which Llava's own can't read."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.linear_1 = nn.Linear(self.vision_width, self.text_width)
        self.act = self.linear_2 = None
        if config.connector != "linear":
            self.act = ACT2FN[NATIVE[config.connector]]
            self.linear_2 = nn.Linear(self.text_width, self.text_width)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.linear_1(tokens_of(features))  # [batch, tokens, D]
        return hidden if self.linear_2 is None or self.act is None else self.linear_2(self.act(hidden))


class PixelShuffle(Connector):
    """
    Squares of `factor²` neighbouring patches become one token; then a layer norm and two linear layers.

    Raises:
        `ValueError`: at a call whose patches are no square grid that `factor` divides.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.factor = config.connector_config["factor"]
        width = self.vision_width * self.factor**2
        self.norm = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, self.text_width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(self.text_width, self.text_width)

    @staticmethod
    def count(tokens: int, options: dict[str, Any]) -> int:
        side, factor = math.isqrt(tokens), options["factor"]
        if side * side != tokens or side % factor:
            raise ValueError(
                f"connector='pixel_shuffle' needs a square grid whose side factor={factor} divides, but the tower "
                f"gives {tokens} tokens an image. Pass another factor, or a tower without class and register tokens."
            )
        return (side // factor) ** 2

    def forward(self, features: Tensor) -> Tensor:
        tokens = tokens_of(features)
        batch, count, width = tokens.shape
        side, factor = math.isqrt(count), self.factor
        self.count(count, {"factor": factor})
        grid = tokens.view(batch, side // factor, factor, side // factor, factor, width)
        squares = grid.transpose(2, 3).reshape(batch, -1, factor * factor * width)
        return self.linear_2(self.act(self.linear_1(self.norm(squares))))


class Resampler(Connector):
    """Idefics2's perceiver: `queries` learned vectors that attend to the features, in the language model's size."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        options = dict(config.connector_config)
        perceiver = Idefics2PerceiverConfig(
            hidden_size=self.text_width, resampler_n_latents=options.pop("queries"), **options
        )
        self.linear = nn.Linear(self.vision_width, self.text_width)
        self.perceiver = Idefics2PerceiverResampler._from_config(perceiver)

    def forward(self, features: Tensor) -> Tensor:
        context = self.linear(tokens_of(features))
        mask = torch.ones(context.shape[:2], dtype=torch.long, device=context.device)
        return self.perceiver(context, attention_mask=mask)


class QFormer(Connector):
    """BLIP-2's Q-Former: `queries` learned vectors in a BERT that attends to the features, then a linear layer."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        options = dict(config.connector_config)
        queries = options.pop("queries")
        bert = Blip2QFormerConfig(encoder_hidden_size=self.vision_width, **options)
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, queries, bert.hidden_size))
        self.qformer = Blip2QFormerModel._from_config(bert)
        self.linear = nn.Linear(bert.hidden_size, self.text_width)

    def forward(self, features: Tensor) -> Tensor:
        context = tokens_of(features)
        queries = self.query_tokens.expand(len(context), -1, -1)
        hidden = self.qformer(query_embeds=queries, encoder_hidden_states=context).last_hidden_state
        return self.linear(hidden.to(context.dtype))


# The connectors outside transformers' Llava, and the options that each takes beside its library's own.
OWN: dict[str, tuple[type[Connector], dict[str, Any]]] = {
    "identity": (Identity, {}),
    "pixel_shuffle": (PixelShuffle, {"factor": 2}),
    "resampler": (Resampler, {"queries": 64}),
    "qformer": (QFormer, {"queries": 32}),
    **dict.fromkeys(NATIVE, (Perceptron, {})),
}
# Configurations whose options a connector takes, too.
LIBRARY: dict[str, Any] = {"resampler": Idefics2PerceiverConfig, "qformer": Blip2QFormerConfig}


def connector_options(connector: str, given: dict[str, Any]) -> dict[str, Any]:
    """
    A connector's options, with their defaults.

    Raises:
        `ValueError`: if there is no such connector, it has no such option, or a number is not positive.
    """
    if connector not in OWN:
        raise ValueError(f"connector={connector!r} is not known; use one of {', '.join(OWN)}.")
    defaults = OWN[connector][1]
    library = LIBRARY.get(connector)
    for name, value in given.items():
        if name not in defaults and (library is None or not hasattr(library(), name)):
            names = [*defaults, *([] if library is None else [f"those of {library.__name__}"])] or ["none"]
            raise ValueError(
                f"connector_config: connector={connector!r} has no option {name!r}; it has {' and '.join(names)}."
            )
        if name in defaults and not (isinstance(value, int) and value > 0):
            raise ValueError(f"connector_config: {name}={value!r} must be a positive whole number.")
    return {**defaults, **given}
