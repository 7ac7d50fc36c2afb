"""From a batch to one loss per task, and how much each micro-batch counts in an accumulation window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


IGNORED = -100


@dataclass(frozen=True)
class Window:
    """
    The micro-batches of one optimiser step, over all processes.

    Attributes:
        counts (`torch.Tensor`): labels (or samples) of each task in each micro-batch of this process, float64
            `[micro-batches, tasks]`.
        totals (`torch.Tensor`): their sum over micro-batches and processes, `[tasks]`.
        anywhere (`torch.Tensor`): whether any process has the task in that micro-batch, bool `[micro-batches, tasks]`.
        num_items (`dict[int, torch.Tensor]`): per task, what losses are divided by where they are sums, if known.
    """

    counts: Tensor
    totals: Tensor
    anywhere: Tensor
    num_items: dict[int, Any]

    @property
    def present(self) -> Tensor:
        """Which tasks the window has, bool `[tasks]`."""
        return self.totals > 0

    def share(self, micro_batch: int, task: int, processes: int) -> float:
        """
        Weight of a mean over this micro-batch, such that the mean over processes of their sum is the mean over the
        whole window.
        """
        return float(self.counts[micro_batch, task] / self.totals[task]) * processes


def labels_of_tasks(label_names: Sequence[str], tasks: Sequence[str]) -> list[str] | None:
    """
    The name of each task's labels where every task has its own: by name (`depth`, `labels_depth`, `label_depth`), else
    by the end of the name, else by position; `None` where labels and tasks do not pair up.
    """
    if len(label_names) != len(tasks):
        return None

    def matching(task: str) -> list[str]:
        exact = [label for label in label_names if label in (task, f"labels_{task}", f"label_{task}")]
        return exact or [label for label in label_names if label.endswith(task)]

    by_name = [matching(task) for task in tasks]
    if all(len(found) == 1 for found in by_name) and len({found[0] for found in by_name}) == len(tasks):
        return [found[0] for found in by_name]
    return list(label_names)


def count_labels_of_tasks(batch: Mapping[str, Any], label_names: Sequence[str], tasks: Sequence[str]) -> Tensor:
    """
    Labels of each task in a batch, float64 `[tasks]`: of its own labels, or of its column where one tensor of labels
    has a column per task. Else the number of samples, the same for all.
    """
    size = batch_size_of(batch)
    names = labels_of_tasks(label_names, tasks)
    if names is not None and all(name in batch for name in names):
        return torch.tensor([count_labels(batch[name], size) for name in names], dtype=torch.float64)
    matrix = batch.get(label_names[0]) if len(label_names) == 1 else None
    if isinstance(matrix, Tensor) and matrix.ndim == 2 and matrix.shape[1] == len(tasks):
        return torch.tensor([count_labels(column, size) for column in matrix.T], dtype=torch.float64)
    return torch.full((len(tasks),), float(size), dtype=torch.float64)


def count_labels(labels: Any, size: int) -> float:
    """Labels that are neither -100 nor NaN; for anything but a tensor, the number of samples."""
    if not isinstance(labels, Tensor):
        return float(size)
    return float(_known(labels).sum())


def count_labels_by_id(batch: Mapping[str, Any], label_names: Sequence[str], ids: Tensor, tasks: int) -> Tensor:
    """
    Labels of each task in a batch of samples with one task each, float64 `[tasks]`; without one tensor of labels laid
    out by samples, the number of samples.

    Args:
        batch (`dict`): the batch.
        label_names (`list[str]`): names of its labels.
        ids (`torch.Tensor`): every sample's task, `[samples]`.
        tasks (`int`): number of tasks.
    """
    ids = ids.cpu()
    labels = batch.get(label_names[0]) if len(label_names) == 1 else None
    if not isinstance(labels, Tensor) or not labels.ndim or len(labels) != len(ids):
        return torch.bincount(ids, minlength=tasks).double()
    known = _known(labels).reshape(len(ids), -1).sum(dim=1).cpu()  # [samples]
    return torch.zeros(tasks, dtype=torch.float64).index_add_(0, ids, known.double())


def _known(labels: Tensor) -> Tensor:
    return ~labels.isnan() if labels.is_floating_point() else labels.ne(IGNORED)


def batch_size_of(batch: Mapping[str, Any]) -> int:
    """Length of the first tensor in a batch."""
    for value in batch.values():
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    return 1


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


def fork_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The random streams that a forward pass on `device` draws from."""
    other = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), other


def restore_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Set the random streams to what `fork_state` returned."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
