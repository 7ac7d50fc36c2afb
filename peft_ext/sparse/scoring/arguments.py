"""Checks of what a scoring pass is given, so that nothing fails inside torch or the model without saying why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_count, check_flag, check_loader, check_model
from ..config import SparseConfig


def check_scoring(model: Any, dataloader: Any, config: Any, max_batches: Any, progress: Any) -> None:
    """
    The arguments that all scoring passes share.

    Raises:
        `ValueError`: if one of them is of another kind than it should be.
    """
    check_model(model)
    check_loader("dataloader", dataloader)
    if config is not None and not isinstance(config, SparseConfig):
        raise ValueError(f"config={config!r} must be a GPSConfig, PSNConfig or NeuroAdaConfig, or None.")
    if max_batches is not None:
        check_count("max_batches", max_batches, ", or None for all batches")
    check_flag("progress", progress)


def check_loss(value: Any, number: int) -> Tensor:
    """
    The loss of a batch, if a gradient can be taken of it.

    Raises:
        `ValueError`: if it is no finite scalar, or does not depend on any weight that is scored.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"The loss of batch {number} is {what}; `loss` must return one number, as a tensor.")
    if not bool(torch.isfinite(value)):
        raise ValueError(f"The loss of batch {number} is {value.item()}, so no entries can be ranked.")
    if not value.requires_grad:
        raise ValueError(
            f"The loss of batch {number} depends on no weight that is scored: `loss`, `features` or the model detach "
            "it, or `config` names layers that come after the features. Score layers before them, and keep the graph."
        )
    return value
