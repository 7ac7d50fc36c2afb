"""Find decoder layers, visual token ids and the connector's last linear layer of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...hf.internals import BaseTunerLayer


REMEDY = "MoReS needs a decoder that attends to visual tokens in its own sequence, such as LLaVA's or Qwen-VL's."
# Placeholders of visual tokens, as transformers' configurations name them.
_TOKEN_IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
# Names of the connectors of the supported families.
_CONNECTORS = ("multi_modal_projector", "connector", "visual.merger")


@dataclass
class Connector:
    """The module between vision and text, by name, and its last linear layer, if it ends in one."""

    name: str
    linear: str | None


@dataclass
class Architecture:
    """The parts of a model that MoReS needs."""

    kind: str  # the model's class
    layers: dict[str, nn.Module]  # the decoder layers by name, in order
    hidden_size: int  # D
    visual_token_ids: tuple[int, ...]  # empty for a text model
    path: list[nn.Module]  # the modules from the model to its decoder, both included
    connector: Connector | None  # `None` if there is none


def inspect_model(model: nn.Module) -> Architecture:
    """
    Find MoReS's places.

    Raises:
        `ValueError`: naming what the model lacks.
    """
    kind = type(model).__name__
    config: Any = getattr(model, "config", None)
    get_decoder: Any = getattr(model, "get_decoder", None)
    if config is None or get_decoder is None:
        raise ValueError(f"{kind} is not a transformers model with a `config` and `get_decoder()`. {REMEDY}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder-decoder: its decoder has no visual tokens to steer. {REMEDY}")
    decoder: Any = get_decoder()
    if decoder is not None and not hasattr(decoder, "layers") and hasattr(decoder, "get_decoder"):
        decoder = decoder.get_decoder()  # some models answer with a whole language model
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise ValueError(
            f"{kind}: its decoder ({type(decoder).__name__}) has no `layers` list of decoder layers. {REMEDY}"
        )
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text_config, "cross_attention_layers", None):
        raise ValueError(
            f"{kind} brings images in through cross-attention layers {text_config.cross_attention_layers}, so its "
            f"sequence has no visual tokens. {REMEDY}"
        )
    names = {id(module): name for name, module in model.named_modules()}
    if id(decoder) not in names:
        raise ValueError(f"{kind}: its decoder is not one of its modules. {REMEDY}")
    hidden_size = getattr(text_config, "hidden_size", None)
    if not isinstance(hidden_size, int):
        raise ValueError(f"{kind}: its text configuration has no `hidden_size`. {REMEDY}")
    ids = tuple(sorted({value for key in _TOKEN_IDS if isinstance(value := getattr(config, key, None), int)}))
    parts = names[id(decoder)].split(".") if names[id(decoder)] else []
    return Architecture(
        kind=kind,
        layers={names[id(layer)]: layer for layer in layers},
        hidden_size=hidden_size,
        visual_token_ids=ids,
        path=[model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)],
        connector=_find_connector(model),
    )


def _find_connector(model: nn.Module) -> Connector | None:
    for name, module in model.named_modules():
        if any(name == known or name.endswith(f".{known}") for known in _CONNECTORS):
            return Connector(name, _last_linear(name, module))
    return None


def _last_linear(prefix: str, module: nn.Module) -> str | None:
    """The linear layer registered last, or the adapter around it: in the supported connectors, what runs last."""
    found, wrapper = None, None
    for name, child in module.named_modules(prefix=prefix):
        if wrapper is not None and name.startswith(wrapper):
            continue  # inside an adapter
        if isinstance(child, BaseTunerLayer):
            wrapper = f"{name}."
            if isinstance(getattr(child, "base_layer", None), nn.Linear):
                found = name
        elif isinstance(child, nn.Linear):
            found = name
    return found
