"""Supports of adapters that are about to be loaded: nothing is chosen for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..bases.neurons import experts_of, matrix_shape
from ..config import SparseConfig
from ..selection.given import uncompiled
from ..selection.plan import kept_neurons, parse_selection
from ..support import Support
from .by_expert import adapted_experts


def placeholder(config: SparseConfig, name: str, base: Any) -> Support:
    """A support of the shape that the config leads to for a base layer, with arbitrary entries."""
    rows, fan_in = matrix_shape(base)
    k = config.entries_per_neuron(fan_in, name)
    _, scope = parse_selection(config.selection)
    experts = experts_of(base) or 1
    adapted = len(adapted_experts(name, base, config)) if experts_of(base) else 1
    if config.support_sizes is not None:
        entries = config.support_sizes.get(name, 0)
    elif scope == "neuron" and config.neuron_ratio == 1.0 and adapted == experts:
        return Support(torch.arange(k, dtype=torch.int32).repeat(rows, 1), fan_in)
    else:  # network-wide sizes are unknown before the weights are: as if shared out evenly
        of_one = rows // experts
        entries = k * adapted * (of_one if scope != "neuron" else kept_neurons(of_one, config.neuron_ratio))
    columns = torch.arange(entries, dtype=torch.int32) % fan_in
    offsets = (torch.arange(rows + 1) * fan_in).clamp(max=entries).to(torch.int32)
    return Support(columns, fan_in, offsets)


def tables_in(state_dict: Mapping[str, Tensor], container: str) -> dict[str, dict[str, Tensor]]:
    """
    The `indices` and `offsets` of each module, by its name, in an adapter's state dict. `container` is the part of the
    keys that stands before the adapter's tensors, such as `"neuroada_delta"`.
    """
    tables: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        module, marker, rest = key.rpartition(f".{container}.")
        name = rest.rpartition(".")[2]
        if marker and name in ("indices", "offsets"):
            tables.setdefault(uncompiled(module), {})[name] = tensor
    return tables


def support_from(tables: dict[str, Tensor], config: SparseConfig, name: str, base: Any) -> Support:
    """
    The support that a state dict gives a module. Sizes that the config leaves open, those of a `_network` selection,
    are noted in the config.

    Raises:
        `ValueError`: if the entries do not fit the weight, or are not as many as the config leads to.
    """
    expected = placeholder(config, name, base)
    indices, offsets = tables["indices"], tables.get("offsets")
    if parse_selection(config.selection)[1] == "network" and name not in (config.support_sizes or {}):
        config.support_sizes = {**(config.support_sizes or {}), name: indices.numel()}
        expected = placeholder(config, name, base)
    shapes = [None if t is None else tuple(t.shape) for t in (indices, offsets, expected.indices, expected.offsets)]
    if shapes[:2] != shapes[2:]:
        raise ValueError(
            f"state_dict has entries of shape {shapes[0]} for module '{name}', where the config leads to {shapes[2]}; "
            "pass the config that the adapter was saved with."
        )
    if indices.is_meta:
        return expected
    try:
        return Support.of_integers(indices, expected.fan_in, offsets)
    except ValueError as error:
        raise ValueError(f"state_dict has corrupted entries for module '{name}': {error}.") from error
