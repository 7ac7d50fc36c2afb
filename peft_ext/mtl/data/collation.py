"""
Samples grouped by task before they are collated.

A collated batch cannot be cut by rows. `pixel_values` may have a row per image or per patch, a packed row holds
several samples, and lengths agree by chance. So no batch is cut anywhere: what the collator makes of a task's samples
is the task's part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


PARTS = "task_parts"
SOURCE = "task_source"

_DISPATCH = "accelerate cuts collated batches into rows (dispatch_batches, its default for data sets without a length)"
_NO_DISPATCH = "Set accelerator_config={'dispatch_batches': False}, or give a map-style data set."


@dataclass(frozen=True)
class Source:
    """The samples that a batch was made of. Data loaders, accelerate and `Trainer` pass it on untouched."""

    size: int  # number of samples
    tasks: list[int] | None = None  # every sample's task, if samples have one each
    samples: list[Any] | None = None  # the samples, if they will be collated again

    def by_task(self) -> dict[int, list[Any]]:
        """The samples of each task."""
        assert self.tasks is not None and self.samples is not None
        return grouped(self.samples, self.tasks)


def grouped(samples: Sequence[Any], tasks: Sequence[int]) -> dict[int, list[Any]]:
    """Samples by task, in the order of the tasks' numbers."""
    groups: dict[int, list[Any]] = {task: [] for task in sorted(set(tasks))}
    for sample, task in zip(samples, tasks, strict=True):
        groups[task].append(sample)
    return groups


class TaskCollator:
    """
    Collates the samples of each task on their own, into `batch["task_parts"][task]`.

    Args:
        collator (`Callable`): makes a batch of a list of samples without task numbers.
        task_column (`str`): key of the task's number in a sample.
        num_tasks (`int`, *optional*): number of tasks, if every sample has one.
        split (`bool`, *optional*, defaults to `True`):
            Whether to take batches apart. Else the batch has all samples, and their tasks under `task_column`.
        whole (`bool`, *optional*, defaults to `False`): whether to collate all samples together as well.
        keep_samples (`bool`, *optional*, defaults to `False`): whether the batch carries its samples along.

    Raises:
        `ValueError`: if only some samples have a task, a task's number is not known, or accelerate would cut batches.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Any],
        task_column: str,
        num_tasks: int | None = None,
        split: bool = True,
        whole: bool = False,
        keep_samples: bool = False,
    ) -> None:
        self.collator = collator
        self.task_column = task_column
        self.num_tasks = num_tasks
        self.split = split
        self.whole = whole
        self.keep_samples = keep_samples
        self.is_dispatched = False  # whether accelerate cuts batches into the processes' rows

    def __call__(self, samples: Any) -> Any:
        if not isinstance(samples, (list, tuple)):  # the data set's `__getitems__` makes batches
            return self.collator(samples)
        tasks = self._tasks_of(samples)
        batch: Any
        if tasks is None:
            batch = self.collate(samples)
        elif not self.split:
            batch = {**self.collate(samples), self.task_column: torch.tensor(tasks)}
        else:
            self.refuse_dispatch()
            batch = dict(self.collate(samples)) if self.whole else {}
            if not self.whole or len(set(tasks)) > 1:
                groups = grouped(samples, tasks)
                batch[PARTS] = {task: dict(self.collate(group)) for task, group in groups.items()}
        if self.is_dispatched:
            self._check_rows(batch, len(samples))
        elif isinstance(batch, MutableMapping):
            batch[SOURCE] = Source(len(samples), tasks, list(samples) if self.keep_samples else None)
        return batch

    def collate(self, samples: Sequence[Any]) -> Any:
        """The collator's batch of copies without task numbers. Some collators change the samples they are given."""
        dropped, kind = (None, dict) if self.num_tasks is None else (self.task_column, Mapping)
        return self.collator(
            [
                {key: value for key, value in sample.items() if key != dropped} if isinstance(sample, kind) else sample
                for sample in samples
            ]
        )

    def _tasks_of(self, samples: Sequence[Any]) -> list[int] | None:
        if self.num_tasks is None:
            return None
        column = self.task_column
        numbers = [sample[column] for sample in samples if isinstance(sample, Mapping) and column in sample]
        if not numbers:  # evaluation on one task's own data set
            return None
        if len(numbers) < len(samples):
            raise ValueError(
                f"{len(samples) - len(numbers)} of the {len(samples)} samples of a batch have no {column!r}: give "
                "every sample its task's number, or none."
            )
        return [task_number(number, column, self.num_tasks) for number in numbers]

    def refuse_dispatch(self) -> None:
        """
        Raises:
            `ValueError`: if accelerate cuts collated batches.
        """
        if self.is_dispatched:
            raise ValueError(f"{_DISPATCH}, so they cannot be taken apart by task. {_NO_DISPATCH}")

    def _check_rows(self, batch: Any, size: int) -> None:
        for key, value in batch.items() if isinstance(batch, Mapping) else ():
            if isinstance(value, Tensor) and value.ndim and len(value) != size:
                raise ValueError(
                    f"{_DISPATCH}, but {key!r} has shape {tuple(value.shape)}, not a row for each of {size} samples. "
                    f"{_NO_DISPATCH}"
                )


def task_number(value: Any, column: str, num_tasks: int) -> int:
    """
    Raises:
        `ValueError`: if `value` is not the number of one of the tasks.
    """
    number = int(value)
    if number != value or not 0 <= number < num_tasks:
        raise ValueError(f"{column}={value!r} is not the number of a task: they are 0 to {num_tasks - 1}.")
    return number


def parts_of(batch: Mapping[str, Any], task_column: str, num_tasks: int) -> dict[int, Any]:
    """
    Each task's part of a batch of a [`TaskCollator`], or of a collated one of a single task. Raises `ValueError` if
    the batch was collated with samples of several tasks in it, or does not say its task.
    """
    if PARTS in batch:
        parts: dict[int, Any] = batch[PARTS]
        return parts
    bare = {key: value for key, value in batch.items() if key not in (SOURCE, task_column)}
    source = batch.get(SOURCE)
    tasks = source.tasks if source is not None else batch.get(task_column)
    if tasks is None:
        raise ValueError(
            f"A batch with {_shapes(bare)} does not say its samples' tasks: let the collator pass {task_column!r} on, "
            "or collate with trainer.task_collator()."
        )
    present = sorted({task_number(task, task_column, num_tasks) for task in torch.as_tensor(tasks).tolist()})
    if len(present) > 1:
        raise ValueError(
            f"A batch with samples of the tasks {present} came collated, and cannot be taken apart: a row of "
            f"{_shapes(bare)} need not be a sample (pixel_values may have a row per image or patch, and a packed row "
            "holds several samples). Let the data loader collate each task on its own, with "
            "collate_fn=trainer.task_collator() and a data set that gives single samples; or give batches of one "
            f"task; or give compute_task_losses_func, with {task_column!r} in label_names."
        )
    return {present[0]: bare}


def _shapes(batch: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key!r} {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
        for key, value in batch.items()
    )


def batch_size_of(batch: Mapping[str, Any]) -> int:
    """
    Number of samples in a batch whose source is not known: the length of all its tensors.

    Raises:
        `ValueError`: if they differ in length.
    """
    lengths = {key: len(value) for key, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"The number of samples in a batch with {_shapes(batch)} cannot be told. Collate with "
            "trainer.task_collator() and a data set that gives single samples, or give every task labels of its own."
        )
    return next(iter(lengths.values()), 1)


def halves_of(samples: Sequence[Any]) -> tuple[Sequence[Any], ...]:
    """Every other sample, and the rest."""
    return samples[::2], samples[1::2]
