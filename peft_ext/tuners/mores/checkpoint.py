"""Checks before a MoReS adapter's tensors are loaded: nothing missing, nothing without a place, R of full rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...hf.adapter_state import MalformedAdapter, check_state, without_wrappers
from .layer import MoReSLayer


def check_checkpoint(
    model: nn.Module, adapter_name: str, tensors: dict[str, Tensor], whole_may_differ: bool = False
) -> None:
    """
    Compare tensors, by their names in the model, with the adapter that awaits them, before they are loaded.
    `whole_may_differ`: see `peft_ext.hf.adapter_state.check_state`.

    Raises [`MalformedAdapter`] if they are not the whole adapter and nothing else, or cannot be an adapter's.
    """
    own = _tensors_of(model, adapter_name)
    check_state(model, adapter_name, tensors, own, "mores_steering", whole_may_differ=whole_may_differ)
    for key in own:
        if key.rpartition(".")[2].startswith("raw_") and not tensors[key].is_meta:
            # Only its directions count, so compare with its own largest number: the scale may be anything.
            singular = torch.linalg.svdvals(tensors[key].double())
            if not singular[-1] > 1e-10 * singular[0]:
                raise MalformedAdapter(
                    f"'{key}' has linearly dependent columns, from which no orthonormal R follows. Nothing was "
                    "loaded; save the adapter again."
                )


def _tensors_of(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, MoReSLayer) and adapter_name in module.mores_steering:
            name = without_wrappers(name)
            for key, tensor in module.mores_steering[adapter_name].state_dict().items():
                tensors[f"{name}.mores_steering.{adapter_name}.{key}"] = tensor
    return tensors
