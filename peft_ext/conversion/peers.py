"""Entries and values of SHiRA and Super-Tuning adapters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.shira import ShiraLayer
from peft.utils import PeftType
from torch import Tensor, nn

from ..sparse.bases.neurons import matrix_shape
from ..sparse.support import Support, support_of


# PEFT 0.21 has Super-Tuning from 0.21.2 on.
SUPERTUNING = PeftType.__members__.get("SUPERTUNING")
CONVERTIBLE = tuple(kind for kind in (PeftType.SHIRA, SUPERTUNING) if kind is not None)


@dataclass
class Entries:
    """The entries that an adapter trains in one weight."""

    support: Support  # which ones
    values: Tensor  # what is added to them, in the shape of `support.indices`


def check_convertible(adapter_name: str, config: PeftConfig) -> None:
    """
    Raises:
        `TypeError`: if an adapter is of another method than these two.
        `ValueError`: if it has parts that are not sparse.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.peft_type not in CONVERTIBLE:
        known = " and ".join(member.value for member in CONVERTIBLE)
        raise TypeError(f"Adapter '{adapter_name}' is a {kind}, but only adapters of {known} can be converted.")
    rank = getattr(config, "r", None) if config.peft_type == SUPERTUNING else None
    if rank:
        raise ValueError(
            f"Adapter '{adapter_name}' has r={rank!r}: beside its entries, Super-Tuning trains a LoRA of that rank, "
            "which a sparse layer has no place for. Keep it in PEFT, merge it with merge_and_unload, or train it "
            "with r=None."
        )


def selection_of(config: Any) -> str:
    """Our name for how an adapter's entries were chosen, which is of no consequence for given ones."""
    if config.peft_type == SUPERTUNING:
        return "magnitude_layer" if config.select_top else "reverse_layer"
    return "random_layer"


def entries_of(model: nn.Module, adapter_name: str) -> dict[str, Entries]:
    """
    The entries of an adapter of SHiRA or Super-Tuning, by the name of their module.

    Raises `ValueError` if a layer lacks its indices, they do not fit its weight, or they are those of packed bytes; or
    if values are not finite.
    """
    found = {}
    for name, layer, values in _layers(model, adapter_name):
        rows, fan_in = matrix_shape(layer.get_base_layer())
        if isinstance(layer, ShiraLayer):
            if adapter_name not in layer.shira_indices:
                raise ValueError(
                    f"'{name}' has no indices for adapter '{adapter_name}': its mask was made by a function of the "
                    "user's. Load the adapter with PEFT from a folder that it was saved in."
                )
            row, column = layer.shira_indices[adapter_name].to(values.device).long()
            scaling = layer.scaling[adapter_name]
            values = values if scaling == 1.0 else values * scaling
        else:
            if not layer.get_base_layer().weight.is_floating_point():
                raise ValueError(
                    f"'{name}' is quantised: Super-Tuning has chosen from its packed bytes, and adapter "
                    f"'{adapter_name}' computes nothing there. Use a base model that is not quantised."
                )
            flat = layer.supertuning_indices[adapter_name].to(values.device).long()
            row, column = flat // fan_in, flat % fan_in
        outside = (row < 0) | (row >= rows) | (column < 0) | (column >= fan_in)
        if bool(outside.any()):
            raise ValueError(
                f"{int(outside.sum())} indices of adapter '{adapter_name}' lie outside the {rows} x {fan_in} weight "
                f"of '{name}'. Use the base model that the adapter was trained on."
            )
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"Adapter '{adapter_name}' has values at '{name}' that are not finite.")
        found[name] = _sorted(row * fan_in + column, values, rows, fan_in)
    return found


def _layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any, Tensor]]:
    """Name, layer and values `[entries]` of each layer that has an adapter."""
    for name, layer in model.named_modules():
        for container in ("shira_weight", "supertuning_values"):
            values = getattr(layer, container, None)
            if isinstance(values, nn.ParameterDict) and adapter_name in values:
                yield name, layer, values[adapter_name].detach()


def _sorted(positions: Tensor, values: Tensor, rows: int, fan_in: int) -> Entries:
    """Entries in the order that our layers keep them in; an entry that occurs twice has the sum of its values."""
    unique, place = torch.unique(positions, sorted=True, return_inverse=True)
    support = support_of(unique, rows, fan_in)
    added = torch.zeros(unique.numel(), dtype=values.dtype, device=values.device).index_add_(0, place, values)
    return Entries(support, added.view(support.indices.shape))
