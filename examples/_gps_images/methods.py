"""The methods of the digits comparison: GPS, what its ablations change, and what it is measured against."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from _quickstart.data import Images
from _quickstart.methods import HEAD, LORA_RANK, Method, through_peft, train_only
from peft import LoraConfig, PeftConfig
from torch import nn
from torch.utils.data import DataLoader

from peft_ext import GPSConfig, NeuroAdaConfig, TwoViewCollator, gps


SCORING_BATCH = 64
SHIFT = 1  # pixels


def shifted(example: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A view of a digit: moved by up to a pixel each way, with some noise."""
    image = example["pixel_values"]  # [1, 8, 8]
    offsets = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
    return {**example, "pixel_values": image.roll(offsets, dims=(1, 2)) + 0.1 * torch.randn(image.shape)}


def scoring_batches(images: Images, seed: int) -> DataLoader[Any]:
    """All images in random order, two views of each."""
    order = torch.Generator().manual_seed(seed)
    return DataLoader(images, SCORING_BATCH, shuffle=True, generator=order, collate_fn=TwoViewCollator(shifted))


def with_gps(images: Images, selection: str, k: int) -> Any:
    """GPS, by its two stages; a selection that needs no scores leaves the first one out."""

    def adapt(model: nn.Module, seed: int) -> nn.Module:
        config = GPSConfig(k=k, selection=selection, seed=seed)
        if not selection.startswith("gradient"):
            return through_peft(lambda model, seed: config)(model, seed)
        return gps(model, config, scoring_batches(images, seed), progress=False)

    return adapt


def methods(images: Images, linears: tuple[str, ...], k: int) -> list[Method]:
    """
    All rows.

    Args:
        images (`Images`): The task's training images, which GPS scores by.
        linears (`tuple[str, ...]`): The model's linear layers.
        k (`int`): Entries per neuron of the sparse methods.
    """
    chosen_by = partial(with_gps, images, k=k)

    def neuroada(model: nn.Module, seed: int) -> PeftConfig:
        return NeuroAdaConfig(k=k, target_modules="all-neurons", modules_to_save=[HEAD])

    def lora(model: nn.Module, seed: int) -> PeftConfig:
        targets = list(linears)
        return LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets, modules_to_save=[HEAD])

    return [
        Method("gps", f"GPS k={k}", 3e-2, chosen_by("gradient")),
        Method("gps_network", "whole-network gradient", 3e-2, chosen_by("gradient_network")),
        Method("gps_random", "random per neuron", 3e-2, chosen_by("random")),
        Method("neuroada", f"NeuroAda k={k}", 1e-1, through_peft(neuroada)),
        Method("lora", f"LoRA r={LORA_RANK}", 1e-2, through_peft(lora)),
        Method("bitfit", "BitFit", 3e-2, train_only(lambda name: name.endswith("bias"))),
        Method("probe", "linear probe", 3e-1, train_only(lambda name: False)),
        Method("full", "full fine-tuning", 1e-3, train_only(lambda name: True)),
    ]
