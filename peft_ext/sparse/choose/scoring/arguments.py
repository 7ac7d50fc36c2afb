"""Checks of what a scoring pass is given, so that nothing fails inside torch or the model without saying why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...checks import check_count, check_flag, check_loader, check_model
from ...config import SparseConfig
from .batches import IGNORED


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


def check_loss(value: Any, number: int, batch: Any) -> Tensor:
    """
    The loss of a batch, if a gradient can be taken of it.

    Raises:
        `ValueError`: if it is no finite scalar, or does not depend on any weight that is scored.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"The loss of batch {number} is {what}; `loss` must return one number, as a tensor.")
    if not bool(torch.isfinite(value)):
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        cause = ""
        if isinstance(labels, Tensor) and bool((labels == IGNORED).all()):
            cause = f" All of its labels are {IGNORED}, which marks what is not to be learned; leave the batch out."
        elif isinstance(labels, Tensor) and labels.dim() > 1 and bool((labels[:, 1:] == IGNORED).all()):
            cause = (
                f" All of its labels but those of first tokens are {IGNORED}, and a causal language model has nothing "
                "to predict its first token from; leave the batch out."
            )
        raise ValueError(f"The loss of batch {number} is {value.item()}, so no entries can be ranked.{cause}")
    if not value.requires_grad:
        raise ValueError(
            f"The loss of batch {number} depends on no weight that is scored: `loss`, `features` or the model detach "
            "it, or `config` names layers that come after the features. Score layers before them, and keep the graph."
        )
    return value


class Classes:
    """Whether the labels of a scoring pass tell anything apart: the lowest and the highest of them."""

    def __init__(self) -> None:
        self.lowest, self.highest = 2**62, -(2**62)

    def add(self, labels: Tensor) -> None:
        """Take a batch's labels."""
        known = labels[labels != IGNORED]
        if known.numel():
            self.lowest = min(self.lowest, int(known.min()))
            self.highest = max(self.highest, int(known.max()))

    def check(self, device: torch.device) -> None:
        """
        Raises:
            `ValueError`: if the labels, in a distributed run of all processes, are all ignored or all the same.
        """
        ends = torch.tensor([-self.lowest, self.highest], device=device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        lowest, highest = -int(ends[0]), int(ends[1])
        if lowest > highest:
            raise ValueError(
                f"Every label is {IGNORED}, which marks samples without one, so there are no classes to tell apart. "
                "Give batches with one class per sample, or pass another `loss`."
            )
        if lowest == highest:
            raise ValueError(
                f"Every label is {lowest}, and one class can't be told apart from others. Give batches with several "
                "classes (a data set sorted by class needs shuffling, or more batches), or pass another `loss`."
            )
