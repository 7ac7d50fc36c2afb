"""Samples of several tasks: one data set from many, and drawing from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Sampler


MIXED_SAMPLINGS = ("mixed", "proportional", "temperature")
SINGLE_TASK_SAMPLINGS = ("homogeneous", "round_robin")
SAMPLINGS = (*MIXED_SAMPLINGS, *SINGLE_TASK_SAMPLINGS)


class TaskDataset(ConcatDataset[Any]):
    """One map-style data set per task as one; each sample, a dict, gets the number of its task under `task_column`."""

    def __init__(self, datasets: Sequence[Any], task_column: str) -> None:
        super().__init__(datasets)
        self.task_column = task_column
        self.task_ids = torch.tensor([task for task, data in enumerate(datasets) for _ in range(len(data))])

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample, task = super().__getitem__(index), int(self.task_ids[index])
        if self.task_column in sample:
            raise ValueError(f"A sample of task {task} has {self.task_column!r} already; set another task_column.")
        return {**sample, self.task_column: task}


def concatenate_tasks(datasets: Mapping[str, Any], task_column: str) -> Any:
    """
    One data set from a dict of them: a `datasets.Dataset` if all are, else a [`TaskDataset`].

    Raises:
        `ValueError`: if one has no length, is empty, or has a column named `task_column` already.
    """
    for name, data in datasets.items():
        if not hasattr(data, "__len__"):
            raise ValueError(
                f"train_dataset[{name!r}] has no length; give map-style data sets, or one data set with a "
                f"{task_column!r} column."
            )
        if not len(data):
            raise ValueError(f"train_dataset[{name!r}] is empty; leave the task out.")
        if task_column in (getattr(data, "column_names", None) or ()):
            raise ValueError(f"train_dataset[{name!r}] has a column {task_column!r} already; set another task_column.")
    if all(hasattr(data, "add_column") for data in datasets.values()):
        from datasets import concatenate_datasets

        parts = [data.add_column(task_column, [task] * len(data)) for task, data in enumerate(datasets.values())]
        return concatenate_datasets(parts)
    return TaskDataset(list(datasets.values()), task_column)


def task_ids_of(dataset: Any, task_column: str) -> Tensor | None:
    """Every sample's task number, `[samples]`, or `None` if the data set does not have them."""
    if isinstance(dataset, TaskDataset) and dataset.task_column == task_column:
        return dataset.task_ids
    if task_column in (getattr(dataset, "column_names", None) or ()):
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                f"train_dataset has a column {task_column!r} but no length: samples of one task each are drawn by "
                "number. Give map-style data sets, or compute_task_losses_func."
            )
        return _whole_numbers(dataset.with_format(None)[task_column][:], task_column)
    if (
        isinstance(dataset, (list, tuple))
        and dataset
        and isinstance(dataset[0], Mapping)
        and task_column in dataset[0]
    ):
        return _whole_numbers([sample.get(task_column) for sample in dataset], task_column)
    return None


def _whole_numbers(values: Sequence[Any], task_column: str) -> Tensor:
    for row, value in enumerate(values):
        if value is None or int(value) != value:
            raise ValueError(f"{task_column!r} of sample {row} is {value!r}; needed is its task's number.")
    return torch.tensor([int(value) for value in values])


class TaskSampler(Sampler[int]):
    """
    Sample numbers in an order that fills micro-batches as `sampling` says; see [`MTLArguments`].

    An epoch has as many samples as the data set. Except with `"proportional"`, which draws each sample once, tasks get
    their shares of them: small tasks are gone through again, in a new order, and large ones not to the end.

    Args:
        task_ids (`torch.Tensor`): every sample's task, `[samples]`.
        num_tasks (`int`): number of tasks.
        sampling (`str`): one of `SAMPLINGS`.
        batch_size (`int`): samples per micro-batch.
        processes (`int`): consecutive micro-batches that processes take at the same time; they get the same task where
            micro-batches have only one.
        temperature (`float`): for `"temperature"`.
        seed (`int`): with the epoch, decides the order.
    """

    def __init__(
        self,
        task_ids: Tensor,
        num_tasks: int,
        sampling: str,
        batch_size: int,
        processes: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.members = [torch.nonzero(task_ids == task).flatten() for task in range(num_tasks)]
        missing = [task for task, members in enumerate(self.members) if not len(members)]
        if missing:
            raise ValueError(f"task {missing[0]} of {num_tasks} has no samples in the training set.")
        self.length = len(task_ids)
        self.sampling = sampling
        self.batch_size = batch_size
        self.processes = processes
        self.temperature = temperature
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        if self.sampling == "proportional":
            everything = torch.cat(self.members)
            return iter(everything[torch.randperm(len(everything), generator=generator)].tolist())
        tasks = self._tasks(generator)  # [samples]
        order = torch.empty(self.length, dtype=torch.long)
        for task, members in enumerate(self.members):
            slots = torch.nonzero(tasks == task).flatten()
            rounds = -(-len(slots) // len(members)) if len(slots) else 0
            drawn = [members[torch.randperm(len(members), generator=generator)] for _ in range(rounds)]
            if drawn:
                order[slots] = torch.cat(drawn)[: len(slots)]
        return iter(order.tolist())

    def _tasks(self, generator: torch.Generator) -> Tensor:
        """The task of each sample in the order in which they are drawn, `[samples]`."""
        count = len(self.members)
        if self.sampling == "temperature":
            sizes = torch.tensor([len(members) for members in self.members], dtype=torch.float64)
            weights = (sizes / sizes.max()) ** (1.0 / self.temperature)
            return torch.multinomial(weights, self.length, replacement=True, generator=generator)
        if self.sampling == "mixed":
            return torch.arange(self.length) % count
        block = self.batch_size * self.processes
        rounds = -(-self.length // (block * count))
        if self.sampling == "round_robin":
            turns = torch.arange(count).repeat(rounds)
        else:
            turns = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])
        return turns.repeat_interleave(block)[: self.length]
