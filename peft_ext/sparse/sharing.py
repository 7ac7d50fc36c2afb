"""Modules that share one weight: one adapter's values serve all of them, and merging changes the weight once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .layers import SparseLayer
from .memory import Maps, Region, why_not_ours
from .neurons import parameter_of
from .offloaded import is_offloaded
from .projection import Projection


def weight_key(base_layer: Any) -> Hashable:
    """
    Equal for layers that see one memory as the same neurons, also through different parameters; `None` for weights
    that are no parameter or offloaded.
    """
    region = None if is_offloaded(base_layer) else _weight_region(base_layer)
    if region is None:  # no parameter, or an offloaded one, which is another after each call
        return None
    # The projections of an attention whose weight has no memory here (meta, sharded) are told apart by their names.
    part = base_layer.name if isinstance(base_layer, Projection) and region.layout is None else None
    return region, part, isinstance(base_layer, Conv1D)


def _weight_region(base_layer: Any) -> Region | None:
    if isinstance(base_layer, Projection):
        whole = Region.of(base_layer.parameter)
        return whole if whole.layout is None else Region.of(base_layer.weight)
    weight = base_layer._parameters.get("weight")
    return None if weight is None else Region.of(weight)


class Uses:
    """
    How often the modules of a model reach each memory by their parameters and buffers.

    Args:
        model (`nn.Module`): the model.
        distinct (`bool`, *optional*, defaults to `False`): count a module once, by however many paths it is reached.
    """

    def __init__(self, model: nn.Module, distinct: bool = False) -> None:
        self._regions: dict[Hashable, list[Region]] = defaultdict(list)
        for _, module in model.named_modules(remove_duplicate=distinct):
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    region = Region.of(tensor)
                    self._regions[region.space].append(region)

    def of(self, region: Region) -> int:
        """Of a memory, whole or in part."""
        return sum(region.overlaps(other) for other in self._regions[region.space])


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
        alike = all(_adapted_alike(layers[0], layer) for layer in layers) and not any(
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
    """What merging into a layer writes, by the names of its parameters: where it lies, and whether others see it."""
    base: Any = layer.get_base_layer()
    weight = _weight_region(base)
    assert weight is not None
    written = {"weight": (weight, why_not_ours(parameter_of(base), maps) is not None)}
    if any(delta.bias is not None for delta in layer.deltas.values()):
        written["bias"] = Region.of(base.bias), why_not_ours(base.bias, maps) is not None
    return written


def _adapted_alike(one: SparseLayer, other: SparseLayer) -> bool:
    return dict(one.deltas.items()) == dict(other.deltas.items())  # modules are equal if they are the same
