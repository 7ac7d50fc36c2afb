"""Find the image tokens of a prompt by the model's config alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cut.edges import check_mask
from .samples import FlowSample


def image_token_ids(config: Any) -> tuple[int, ...]:
    """Placeholders of images and videos in input_ids. Raises `ValueError` if the config names none."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    ids = {value for name in names if isinstance(value := getattr(config, name, None), int)}
    if not ids:
        raise ValueError("The model's config names no image token: name it, as visual_token_ids or groups['image'].")
    return tuple(sorted(ids))


def image_tokens(sample: FlowSample, config: Any) -> Tensor:
    """Bool `[batch, sequence]`: the patches, without newline tokens. Raises `ValueError` if a row has none."""
    tokens = sample.inputs["input_ids"]
    if "image" in sample.groups:
        image = sample.groups["image"].to(tokens.device)
    else:
        image = torch.isin(tokens, torch.tensor(image_token_ids(config), device=tokens.device))
        if (mask := sample.inputs.get("attention_mask")) is not None:
            image = image & mask.bool()
    if "newline" in sample.groups:
        image = image & ~sample.groups["newline"].to(tokens.device)
    return check_mask(image, "inputs: the image")
