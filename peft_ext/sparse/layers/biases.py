"""Biases that PEFT does not find for a config's `bias`: those that belong to no layer of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ...hf.adapter_state import without_wrappers
from .composite import SparseComposite


def part_biases(model: nn.Module, bias: str) -> Iterator[tuple[str, Tensor]]:
    """
    Names in the state dict and parameters (while FSDP has them unsharded, plain tensors) of the biases in attention
    modules and experts that a config's `bias` trains.
    """
    if bias == "none":
        return
    for name, module in model.named_modules():
        base: Any = module
        path = name
        if isinstance(module, SparseComposite):
            base, path = module.base_layer, f"{name}.base_layer"
        elif bias != "all" or not isinstance(module, nn.MultiheadAttention):
            continue
        path = without_wrappers(path)
        biases: dict[str, Any]
        if isinstance(base, nn.MultiheadAttention):
            biases = {"in_proj_bias": base.in_proj_bias, "out_proj.bias": base.out_proj.bias}
        else:
            biases = {f"{part}_bias": getattr(base, f"{part}_bias", None) for part in module.part_names}
        for key, tensor in biases.items():
            if tensor is not None:
                yield f"{path}.{key}" if path else key, tensor
