"""The two small models of the digits comparison, built from configs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from _quickstart import pretraining
from _quickstart.data import CLASSES
from transformers import ConvNextConfig, ConvNextForImageClassification, PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """
    A model of the comparison.

    Args:
        name (`str`): Key in the JSON.
        label (`str`): What the tables call it.
        build (`Callable[[bool], PreTrainedModel]`): Makes one with random weights; smallest possible if asked for.
        linears (`tuple[str, ...]`): Names of its linear layers, which LoRA adapts.
    """

    name: str
    label: str
    build: Callable[[bool], PreTrainedModel]
    linears: tuple[str, ...]


def _vit(smallest: bool) -> PreTrainedModel:
    return pretraining.build(16, 1, seed=0) if smallest else pretraining.build(128, 2, seed=0)


def _convnext(smallest: bool) -> PreTrainedModel:
    """Two stages of 4x4 and 2x2 positions. The layer scale begins at 0.1, since pretraining is short."""
    torch.manual_seed(0)
    config = ConvNextConfig(
        num_channels=1,
        patch_size=2,
        num_stages=2,
        hidden_sizes=[8, 16] if smallest else [64, 128],
        depths=[1, 1] if smallest else [2, 2],
        layer_scale_init_value=0.1,
        num_labels=CLASSES,
    )
    return ConvNextForImageClassification(config)


ARCHITECTURES = {
    "vit": Architecture("vit", "ViT", _vit, ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")),
    "convnext": Architecture("convnext", "ConvNeXt", _convnext, ("pwconv1", "pwconv2")),
}
