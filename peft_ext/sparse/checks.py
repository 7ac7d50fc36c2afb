"""Checks of arguments: each error names the argument, its value and what to pass instead."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def check_flag(name: str, value: Any) -> None:
    """
    Raises:
        `ValueError`: if the value is not True or False.
    """
    if type(value) is not bool:
        raise ValueError(f"{name}={value!r} must be True or False.")


def check_share(name: str, value: Any, of: str) -> None:
    """
    Raises:
        `ValueError`: if the value is no number in (0, 1].
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0:
        raise ValueError(f"{name}={value!r} must be a number in (0, 1]: the share of {of}.")


def check_count(name: str, value: Any, otherwise: str = "") -> None:
    """
    Raises:
        `ValueError`: if the value is no whole number of at least 1.
    """
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1{otherwise}.")


def check_model(model: Any) -> None:
    """
    Raises:
        `ValueError`: if the value is no `torch.nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r} must be a torch.nn.Module, such as a transformers model.")


def check_loader(name: str, loader: Any) -> None:
    """
    Raises:
        `ValueError`: if batches can't be drawn from the value.
    """
    if not isinstance(loader, Iterable) or isinstance(loader, (str, bytes)):
        raise ValueError(
            f"{name}={loader!r} gives no batches; pass a DataLoader, or a list of batches: mappings of the model's "
            "arguments, or pairs of inputs and labels."
        )
