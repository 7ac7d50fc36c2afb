"""The tasks' losses of one optimiser step, added up over its micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..aggregators.base import Array
from ..parallel import any_process, mean_of_processes
from .losses import Window


@dataclass
class StepLosses:
    """
    How far an optimiser step has come.

    Attributes:
        window ([`Window`]): the labels of its micro-batches.
        begun (`int`): micro-batches begun.
        sums (`np.ndarray`): the tasks' losses so far, weighted so that they add up to means, float64 `[tasks]`.
        seen (`torch.Tensor`): which tasks have had a loss, bool `[tasks]`.
        returned (`float`): the loss that `Trainer` has been given.
    """

    window: Window
    begun: int = 0
    sums: Array = field(init=False)
    seen: Tensor = field(init=False)
    returned: float = 0.0

    def __post_init__(self) -> None:
        tasks = len(self.window.totals)
        self.sums = np.zeros(tasks)
        self.seen = torch.zeros(tasks, dtype=torch.bool)

    @property
    def index(self) -> int:
        """Number of the last micro-batch begun, from 0."""
        return self.begun - 1

    def add(self, losses: Mapping[int, Tensor]) -> None:
        """Add a micro-batch's weighted losses, by task number."""
        self.seen[list(losses)] = True
        self.sums = self.sums + self.as_array(losses)

    def as_array(self, losses: Mapping[int, Tensor]) -> Array:
        """float64 `[tasks]`; zero for tasks that are not there."""
        values = np.zeros(len(self.sums))
        if losses:
            values[list(losses)] = torch.stack([loss.detach().float() for loss in losses.values()]).double().tolist()
        return values

    def close(self, device: torch.device) -> Array:
        """
        Leave out the tasks that had labels, but no loss in any process.

        Returns:
            The tasks' mean losses over processes, float64 `[tasks]`; NaN for absent ones.
        """
        seen = any_process(self.seen.to(device)).cpu()
        self.window = replace(self.window, totals=self.window.totals * seen)
        return self.averaged(self.sums, device)

    def averaged(self, sums: Array, device: torch.device) -> Array:
        """Means of `sums` `[tasks]` over processes; NaN for absent tasks."""
        return np.where(self.window.present.numpy(), mean_of_processes(sums, device), np.nan)

    def next_loss(self, reduction: str) -> float:
        """
        The micro-batch's share of the step's loss. The shares add up, even if the last micro-batch shows that a task
        is absent.
        """
        divisor = int(self.window.present.sum()) if reduction == "mean" else 1
        loss = float(self.sums.sum()) / max(1, divisor) - self.returned
        self.returned += loss
        return loss
