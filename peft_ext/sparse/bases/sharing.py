"""Layers that share a weight. A weight is identified by its memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..memory import Region
from .offloaded import is_offloaded
from .part import Part


def weight_key(base_layer: Any) -> Hashable:
    """
    Equal for layers that see one memory as the same neurons, also through different parameters; `None` for weights
    that are no parameter or offloaded.
    """
    region = None if is_offloaded(base_layer) else weight_region(base_layer)
    if region is None:  # no parameter, or an offloaded one, which is another after each call
        return None
    # Parts of one parameter that has no memory here (meta, sharded) are told apart by their names.
    part = base_layer.name if isinstance(base_layer, Part) and region.layout is None else None
    return region, part, isinstance(base_layer, Conv1D)


def identity(base_layer: Any) -> Hashable:
    """Which layer this is: of a part, which is made anew by whoever looks at it, by its owner and name."""
    return (id(base_layer.owner), base_layer.name) if isinstance(base_layer, Part) else id(base_layer)


def weight_region(base_layer: Any) -> Region | None:
    """The memory of a layer's weight; `None` if the weight is no parameter."""
    if isinstance(base_layer, Part):
        whole = Region.of(base_layer.parameter)
        return whole if whole.layout is None else Region.of(base_layer.weight)
    weight = base_layer._parameters.get("weight")
    return None if weight is None else Region.of(weight)


class Uses:
    """
    How often the modules of a model reach each memory by their parameters and buffers. With `distinct` a module counts
    once, by however many paths it is reached.
    """

    def __init__(self, model: nn.Module, distinct: bool = False) -> None:
        self._regions: dict[Hashable, list[Region]] = defaultdict(list)
        for _, module in model.named_modules(remove_duplicate=distinct):
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    region = Region.of(tensor)
                    self._regions[region.space].append(region)

    def of(self, region: Region) -> int:
        """Number of times that modules reach a region, whole or in part."""
        return sum(region.overlaps(other) for other in self._regions[region.space])
