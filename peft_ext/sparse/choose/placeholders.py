"""Supports of adapters that are about to be loaded: nothing is chosen for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import SparseConfig
from ..selection import parse_selection
from ..selection.plan import kept_neurons
from ..support import Support


def placeholder(config: SparseConfig, name: str, rows: int, fan_in: int) -> Support:
    """A support of the shape that the config leads to, with arbitrary entries."""
    k = config.entries_per_neuron(fan_in)
    _, scope = parse_selection(config.selection)
    if config.support_sizes is not None:
        entries = config.support_sizes.get(name, 0)
    elif scope == "neuron" and config.neuron_ratio == 1.0:
        return Support(torch.arange(k, dtype=torch.int32).repeat(rows, 1), fan_in)
    else:  # network-wide sizes are unknown before the weights are: as if shared out evenly
        entries = k * (rows if scope != "neuron" else kept_neurons(rows, config.neuron_ratio))
    columns = torch.arange(entries, dtype=torch.int32) % fan_in
    offsets = (torch.arange(rows + 1) * fan_in).clamp(max=entries).to(torch.int32)
    return Support(columns, fan_in, offsets)


def tables_in(state_dict: Mapping[str, Tensor], container: str) -> dict[str, dict[str, Tensor]]:
    """
    The `indices` and `offsets` of each module in an adapter's state dict, by the module's name.

    Args:
        state_dict (`dict[str, torch.Tensor]`): as `get_peft_model_state_dict` gives it for a model that was injected.
        container (`str`): the part of the keys that stands before the adapter's tensors, such as `"neuroada_delta"`.
    """
    tables: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        module, marker, rest = key.rpartition(f".{container}.")
        name = rest.rpartition(".")[2]
        if marker and name in ("indices", "offsets"):
            tables.setdefault(module.removeprefix("_orig_mod."), {})[name] = tensor
    return tables


def support_from(tables: dict[str, Tensor], config: SparseConfig, name: str, rows: int, fan_in: int) -> Support:
    """
    The support that a state dict gives a module. Sizes that the config leaves open, those of a `_network` selection,
    are noted in the config.

    Raises:
        `ValueError`: if the entries do not fit the weight, or are not as many as the config leads to.
    """
    expected = placeholder(config, name, rows, fan_in)
    indices, offsets = tables["indices"], tables.get("offsets")
    if parse_selection(config.selection)[1] == "network" and name not in (config.support_sizes or {}):
        config.support_sizes = {**(config.support_sizes or {}), name: indices.numel()}
        expected = placeholder(config, name, rows, fan_in)
    shapes = [None if t is None else tuple(t.shape) for t in (indices, offsets, expected.indices, expected.offsets)]
    if shapes[:2] != shapes[2:]:
        raise ValueError(
            f"state_dict has entries of shape {shapes[0]} for module '{name}', where the config leads to {shapes[2]}; "
            "pass the config that the adapter was saved with."
        )
    if indices.is_meta:
        return expected
    try:
        return Support.of_integers(indices, fan_in, offsets)
    except ValueError as error:
        raise ValueError(f"state_dict has corrupted entries for module '{name}': {error}.") from error
