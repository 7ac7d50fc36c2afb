"""Modules that share one weight: one adapter's values serve all of them, and merging changes the weight once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import Any

from torch import nn

from ..bases.neurons import parameter_of
from ..bases.sharing import Uses, weight_key, weight_region
from ..layers import SparseLayer
from ..memory import Maps, Region, why_not_ours


def note_sharing(model: nn.Module, layer_cls: type[SparseLayer]) -> None:
    """
    Tell the adapted layers how to merge: those that share a weight and have the same adapters merge once for all. A
    layer merges into copies of what something else uses too, such as an embedding or another process.

    Layers that are merged at the moment keep what they were told.
    """
    uses, maps = Uses(model), Maps()
    users: dict[Hashable, list[SparseLayer]] = defaultdict(list)
    for _, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, layer_cls):
            key = weight_key(module.get_base_layer())
            if key is not None:
                users[key].append(module)
    for reached in users.values():
        layers = list(dict.fromkeys(reached))
        if any(layer.merged for layer in layers):
            continue
        written = {layer: _written(layer, maps) for layer in layers}
        deltas = [dict(layer.deltas.items()) for layer in layers]  # modules are equal if they are the same
        alike = all(own == deltas[0] for own in deltas) and not any(
            foreign or uses.of(region) > len(reached) for region, foreign in written[layers[0]].values()
        )
        for layer in layers:
            layer.merge_alone()
            parameters = written[layer].items()
            shared = [name for name, (region, foreign) in parameters if foreign or uses.of(region) > 1]
            layer.copied_to_merge = () if alike else tuple(shared)
        for layer in layers[1:] if alike else ():
            layer.merge_with(layers[0])


def _written(layer: SparseLayer, maps: Maps) -> dict[str, tuple[Region, bool]]:
    """Memory that merging into a layer writes, by the names of its parameters, and whether others see it."""
    base: Any = layer.get_base_layer()
    weight = weight_region(base)
    assert weight is not None
    written = {"weight": (weight, why_not_ours(parameter_of(base), maps) is not None)}
    if any(delta.bias is not None for delta in layer.deltas.values()):
        written["bias"] = Region.of(base.bias), why_not_ours(base.bias, maps) is not None
    return written
