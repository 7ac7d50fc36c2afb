"""Modules that share one weight: one adapter's values serve all of them, and merging changes the weight once."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .layers import SparseLayer
from .projection import Projection


def weight_key(base_layer: Any) -> tuple[int, bool] | None:
    """Equal for layers that see one parameter as the same neurons; `None` for weights that are no parameter."""
    weight = base_layer._parameters.get("weight")
    return None if weight is None else (id(weight), isinstance(base_layer, Conv1D))


def note_sharing(model: nn.Module, layer_cls: type[SparseLayer]) -> None:
    """
    Tell the adapted layers how to merge: those that share a weight and have the same adapters merge once for all; a
    layer whose weight something else uses too, such as an embedding, merges into a copy.

    Layers that are merged at the moment keep what they were told.
    """
    uses: dict[int, int] = defaultdict(int)  # how often each parameter is reached, also through a module used twice
    users: dict[tuple[int, str], list[SparseLayer]] = defaultdict(list)
    for _, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            uses[id(parameter)] += 1
        if isinstance(module, layer_cls):
            base: Any = module.get_base_layer()
            if isinstance(base, Projection):
                users[id(base.attention.get_parameter(base.parameter_name)), base.name].append(module)
            elif "weight" in base._parameters:
                users[id(base.weight), ""].append(module)
    for (weight, _), reached in users.items():
        layers = list(dict.fromkeys(reached))
        if any(layer.merged for layer in layers):
            continue
        alike = uses[weight] == len(reached) and all(_adapted_alike(layers[0], layer) for layer in layers)
        for layer in layers:
            layer.merge_alone()
            layer.shares_weight = not alike and uses[weight] > 1
        for layer in layers[1:] if alike else ():
            layer.merge_with(layers[0])


def _adapted_alike(one: SparseLayer, other: SparseLayer) -> bool:
    return dict(one.deltas.items()) == dict(other.deltas.items())  # modules are equal if they are the same
