"""Vision towers: loading one, and what it makes of an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, LlavaImageProcessor

from .connectors import tokens_of, vision_width


def load_tower(name: str, dtype: Any) -> Any:
    """A vision model; of a pair such as CLIP, the vision part."""
    config = AutoConfig.from_pretrained(name)
    config = getattr(config, "vision_config", config)
    kind = model_class(config, f"vision_tower={name!r}")
    tower, report = kind.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(
            f"vision_tower={name!r} lacks weights of a {kind.__name__}: {sorted(report['missing_keys'])[:3]}. Pass "
            "the folder that the vision model was saved to."
        )
    return tower


def model_class(config: Any, what: str) -> Any:
    """The class that AutoModel makes of a configuration, as Llava does with its parts."""
    try:
        with torch.device("meta"):
            return type(AutoModel.from_config(config))
    except ValueError as error:
        raise ValueError(f"{what}: transformers has no model for a {type(config).__name__}.") from error


def pad_to_square(images: Any) -> Any:
    """
    An image processor that pads to a square with the mean colour, as LLaVA-1.5's recipe does, instead of cropping.

    Raises:
        `ValueError`: if the processor's images are no squares.
    """
    height, width = blank(images).shape[-2:]
    if height != width:
        raise ValueError(f"pad: the image processor makes {height} × {width} pixels, which are no square.")
    size = {"height": height, "width": width}
    kept = {name: value for name in _KEPT if (value := getattr(images, name, None)) is not None}
    return LlavaImageProcessor(**kept, do_pad=True, size={"shortest_edge": height}, crop_size=size)


_KEPT = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample", "do_convert_rgb")


def blank(images: Any, width: int = 64) -> Any:
    """Pixels of a grey image, 64 high, as the image processor makes them: `[1, channels, height, width]`."""
    return images(images=grey(width), return_tensors="pt")["pixel_values"]


def grey(width: int = 64) -> Image.Image:
    """A grey image, 64 high."""
    return Image.fromarray(np.full((64, width, 3), 127, np.uint8))


@torch.no_grad()
def features(tower: Any, images: Any, layer: int) -> torch.Tensor:
    """
    A grey image's features, `[1, tokens, D]`, with a class token if there is one.

    Raises:
        `ValueError`: if the tower can't be used in a Llava.
    """
    kind, pixels = type(tower).__name__, blank(images)
    if pixels.dim() != 4 or pixels.shape != blank(images, 96).shape:
        raise ValueError(
            f"vision_tower: the image processor makes {tuple(pixels.shape)} of a square image and "
            f"{tuple(blank(images, 96).shape)} of a wide one, but Llava needs one picture of one size, [1, channels, "
            "height, width]. Set its crop or its size."
        )
    try:
        states = tower.eval()(pixels.to(tower.dtype), output_hidden_states=True, return_dict=True).hidden_states
        features = tokens_of(states[layer])
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"vision_tower: {kind} does not answer pixel values alone with hidden states of layer {layer} "
            f"({error}), so transformers' Llava can't call it."
        ) from error
    width = vision_width(tower.config)
    if features.dim() != 3 or features.shape[2] != width:
        raise ValueError(
            f"vision_tower: layer {layer} of {kind} has features of shape {tuple(states[layer].shape)}, but its "
            f"configuration says size {width}. Choose another feature_layer, such as -1."
        )
    return features


def gives_maps(tower: Any) -> bool:
    """Whether the tower's features are maps, as a convolutional network's."""
    return not isinstance(getattr(tower.config, "hidden_size", None), int)


def has_class_token(tower: Any, features: torch.Tensor) -> bool:
    """Whether the first token is no patch. Register tokens after it stay, as transformers' Llava keeps them."""
    names = {name.rsplit(".", 1)[-1] for name, _ in tower.named_parameters()}
    return bool(names & {"class_embedding", "cls_token"}) and features.shape[1] > 1
