"""Checks before a MoReS adapter's tensors are loaded: nothing missing, nothing without a place, R of full rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...sparse.sharded import without_wrappers
from .layer import MoReSLayer


def check_checkpoint(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> None:
    """
    Compare tensors that are about to be loaded with the adapter that awaits them.

    Args:
        model (`torch.nn.Module`): the model with the adapter's layers.
        adapter_name (`str`): the adapter.
        tensors (`dict[str, torch.Tensor]`): by their names in the model.

    Raises:
        `ValueError`: if tensors are missing, have no place, do not fit, or cannot be an adapter's. Nothing has been
            loaded then.
    """
    expected = _tensors_of(model, adapter_name)
    for key, here in expected.items():
        if key not in tensors:
            raise ValueError(
                f"The checkpoint lacks '{key}', so it is only a part of adapter '{adapter_name}' or was made with "
                "other options. Nothing was loaded; save the whole adapter again."
            )
        if tensors[key].shape != here.shape:
            raise ValueError(
                f"'{key}' has shape {tuple(tensors[key].shape)} in the checkpoint, but the config and the base model "
                f"lead to {tuple(here.shape)}. Nothing was loaded; use the config and base model it was saved with."
            )
        _check_values(key, tensors[key])
    unknown = sorted(key for key in tensors if ".mores_steering." in key and key not in expected)
    if unknown:
        raise ValueError(
            f"The checkpoint has '{unknown[0]}', which has no place in this model. Nothing was loaded; use the config "
            "and base model it was saved with."
        )


def check_arrived(model: nn.Module, adapter_name: str) -> None:
    """
    Check an adapter's values after they were loaded by a way that did not ask before.

    Raises:
        `ValueError`: if they cannot be an adapter's.
    """
    for key, tensor in _tensors_of(model, adapter_name).items():
        _check_values(key, tensor)


def _tensors_of(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, MoReSLayer) and adapter_name in module.mores_steering:
            name = without_wrappers(name)
            for key, tensor in module.mores_steering[adapter_name].state_dict().items():
                tensors[f"{name}.mores_steering.{adapter_name}.{key}"] = tensor
    return tensors


def _check_values(key: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        return
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"'{key}' has values that are not finite; save the adapter again.")
    if key.rpartition(".")[2].startswith("raw_"):
        # Only its directions count, so compare with its own largest number: the scale may be anything.
        singular = torch.linalg.svdvals(tensor.double())
        if not singular[-1] > 1e-10 * singular[0]:
            raise ValueError(
                f"'{key}' has linearly dependent columns, from which no orthonormal R follows; save the adapter again."
            )
