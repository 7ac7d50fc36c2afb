"""Tensors that collect the gradients of scored layers: their weights, or aliases of shared weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...bases.part import Part
from ...bases.sharing import Uses
from ...memory import Region


@contextmanager
def own_leaves(model: nn.Module, layers: Mapping[str, Any]) -> Iterator[dict[str, nn.Parameter]]:
    """
    Per scored layer, by name, the parameter whose gradient is what an adapter on the layer would get.

    An output layer tied to the embedding would also get the gradient of the look-up, which no adapter on it sees. So
    while the context is open, layers whose weight something else uses read it through a parameter of their own over
    the same memory. Layers that share a weight, and so an adapter's values, share that parameter.
    """
    uses = Uses(model, distinct=True)
    groups: dict[Hashable, list[str]] = defaultdict(list)
    # The module that has a layer's weight among its parameters, and the weight's name there.
    holders = {name: layer.holder if isinstance(layer, Part) else (layer, "weight") for name, layer in layers.items()}
    for name, layer in layers.items():
        groups[Region.of(_held(holders[name])), isinstance(layer, Conv1D)].append(name)
    leaves: dict[str, nn.Parameter] = {}
    replaced: dict[tuple[nn.Module, str], tuple[nn.Parameter, nn.Parameter]] = {}
    for names in groups.values():
        ours = {holders[name]: _held(holders[name]) for name in names}
        leaf = next(iter(ours.values()))
        region = Region.of(leaf)
        others_use_it = region.layout is not None and uses.of(region) > len(ours)
        if others_use_it or len(set(map(id, ours.values()))) > 1:
            leaf = nn.Parameter(leaf.detach(), requires_grad=False)
            replaced.update({holder: (parameter, leaf) for holder, parameter in ours.items()})
        leaves.update(dict.fromkeys(names, leaf))
    try:
        for (module, name), (_, leaf) in replaced.items():
            module._parameters[name] = leaf
        yield leaves
    finally:
        for (module, name), (parameter, _) in replaced.items():
            module._parameters[name] = parameter


def _held(holder: tuple[nn.Module, str]) -> nn.Parameter:
    parameter = holder[0]._parameters[holder[1]]
    assert parameter is not None
    return parameter
