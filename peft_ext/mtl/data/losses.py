"""From a batch to one loss per task, and how much each micro-batch counts in an accumulation window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..aggregators.base import Array
from ..parallel import any_process, mean_of_processes
from .collation import batch_size_of


IGNORED = -100


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimiser step, over all processes."""

    # Labels (or samples) of each task in each micro-batch of this process, float64 `[micro-batches, tasks]`
    counts: Tensor
    totals: Tensor  # their sum over micro-batches and processes, `[tasks]`
    anywhere: Tensor  # whether any process has the task in that micro-batch, bool `[micro-batches, tasks]`
    num_items: dict[int, Any]  # per task, what losses are divided by where they are sums, if known

    @property
    def present(self) -> Tensor:
        """Tasks of the window, bool `[tasks]`."""
        return self.totals > 0

    def of_one(self, counts: Tensor) -> Window:
        """For a part of this process's micro-batch alone, with `counts` `[tasks]` labels."""
        return replace(self, counts=counts[None], anywhere=counts[None] > 0)

    def share(self, micro_batch: int, task: int, processes: int) -> float:
        """
        Weight of a mean over this micro-batch, such that the mean over processes of their sum is the mean over the
        whole window.
        """
        return float(self.counts[micro_batch, task] / self.totals[task]) * processes


@dataclass
class StepLosses:
    """How far an optimiser step has come."""

    window: Window  # the labels of its micro-batches
    begun: int = 0  # micro-batches begun
    # The tasks' losses so far, weighted so that they add up to means, float64 `[tasks]`
    sums: Array = field(init=False)
    seen: Tensor = field(init=False)  # which tasks have had a loss, bool `[tasks]`
    returned: float = 0.0  # the loss that `Trainer` has been given

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


def labels_of_tasks(label_names: Sequence[str], tasks: Sequence[str]) -> list[str] | None:
    """
    The name of each task's labels where every task has its own: by name (`depth`, `labels_depth`, `label_depth`), else
    by the end of the name, and those that are left by position; `None` where labels and tasks do not pair up.
    """
    if len(label_names) != len(tasks):
        return None

    def matching(task: str) -> list[str]:
        exact = [label for label in label_names if label in (task, f"labels_{task}", f"label_{task}")]
        return exact or [label for label in label_names if label.endswith(task)]

    by_name = {task: found[0] for task in tasks if len(found := matching(task)) == 1}
    if len(set(by_name.values())) < len(by_name):
        by_name = {}
    left = [label for label in label_names if label not in by_name.values()]
    return [by_name.get(task) or left.pop(0) for task in tasks]


def count_labels_of_tasks(
    batch: Mapping[str, Any], label_names: Sequence[str], tasks: Sequence[str], size: int | None = None
) -> Tensor | None:
    """
    Labels of each task in a batch, float64 `[tasks]`: of its own labels, or of its column where one tensor of labels
    has a column per task. Without any label, the number of samples: `size`, or the length of all tensors of the batch.
    `None` if there are labels and they do not say which task they are of.

    Raises `ValueError` if the number of samples is needed and cannot be told.
    """
    own = labels_of_tasks(label_names, tasks)
    given = [name for name in label_names if name in batch]
    if own is not None and given:
        counts = [count_labels(batch[name]) if name in batch else None for name in own]
    else:
        labels = [batch[name] for name in given]
        matrix = labels[0] if len(label_names) == 1 and labels else None
        if isinstance(matrix, Tensor) and _has_columns(matrix, batch, len(tasks)):
            counts = [count_labels(column) for column in matrix.T]
        elif any(isinstance(label, Tensor) for label in labels):
            return None
        else:
            counts = [None] * len(tasks)
    if None in counts and size is None:
        size = batch_size_of(batch)
    return torch.tensor([size if count is None else count for count in counts], dtype=torch.float64)


def _has_columns(labels: Tensor, batch: Mapping[str, Any], tasks: int) -> bool:
    """Whether labels are `[samples, tasks]`, and not as many tokens as there are tasks."""
    ids = batch.get("input_ids")
    by_token = isinstance(ids, Tensor) and ids.shape == labels.shape
    return labels.ndim == 2 and labels.shape[1] == tasks and not by_token


def count_labels(labels: Any) -> float | None:
    """Labels that are neither -100 nor NaN; `None` for anything but a tensor with a dimension."""
    if not isinstance(labels, Tensor) or not labels.ndim:
        return None
    return float(_known(labels).sum())


def count_labels_by_id(batch: Mapping[str, Any], label_names: Sequence[str], ids: Tensor, tasks: int) -> Tensor:
    """
    Labels of each task in a batch of samples with one task each (`ids`, `[samples]`), float64 `[tasks]`; without one
    tensor of labels, the number of samples. Raises `ValueError` if the labels have no row per sample.
    """
    ids = ids.cpu()
    labels = batch.get(label_names[0]) if len(label_names) == 1 else None
    if not isinstance(labels, Tensor) or not labels.ndim:
        return torch.bincount(ids, minlength=tasks).double()
    if len(labels) != len(ids):
        raise ValueError(
            f"{label_names[0]!r} has shape {tuple(labels.shape)}, not one row for each of {len(ids)} samples, so the "
            "tasks' labels cannot be counted. Let the collator make a row per sample, or leave "
            "compute_task_losses_func out, and each task is collated on its own."
        )
    known = _known(labels).reshape(len(ids), -1).sum(dim=1).cpu()  # [samples]
    return torch.zeros(tasks, dtype=torch.float64).index_add_(0, ids, known.double())


def _known(labels: Tensor) -> Tensor:
    return labels.ne(IGNORED) & ~labels.isnan()


def split_labels(inputs: Mapping[str, Any], label_names: Sequence[str]) -> tuple[dict[str, Any], Any]:
    """The model's inputs without labels, and the labels: one tensor, or a dict where there are several."""
    bare = {key: value for key, value in inputs.items() if key not in label_names}
    found = {name: inputs[name] for name in label_names if name in inputs}
    if len(label_names) == 1 and found:
        return bare, found[label_names[0]]
    return bare, found or None


def checked_losses(losses: Any, source: str) -> dict[str, Tensor]:
    """
    The losses that are there, by task.

    Raises:
        `ValueError`: if `losses` is not a dict of scalar tensors.
    """
    if not isinstance(losses, Mapping):
        raise ValueError(f"{source} must be a dict of one scalar loss per task, not {type(losses).__name__}.")
    present = {str(name): loss for name, loss in losses.items() if loss is not None}
    for name, loss in present.items():
        if not isinstance(loss, Tensor) or loss.ndim:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"{source}[{name!r}] must be a scalar tensor, not {shape}; reduce it, or leave it out.")
    return present
