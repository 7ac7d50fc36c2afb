"""Number of labels of each task in the batches of one optimiser step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..parallel import any_process, processes, sum_over_processes
from .collation import SOURCE, Source, batch_size_of, parts_of
from .losses import Window, count_labels, count_labels_by_id, count_labels_of_tasks
from .task_data import TaskData


logger = logging.getLogger(__name__)


class TaskCounts:
    """
    Counts the labels of each task. `shifts_labels`: the model's loss leaves out the first label of every row, as that
    of a causal language model does.
    """

    def __init__(self, data: TaskData, label_names: Sequence[str], shifts_labels: bool) -> None:
        self.data = data
        self.label_names = [name for name in label_names if name != data.config.task_column]
        self.shifts_labels = shifts_labels
        self.has_warned = False

    def window(
        self, batches: list[Any], device: torch.device, num_items_of: Callable[..., Any], is_sharded: bool
    ) -> Window:
        """
        The labels of the micro-batches of one optimiser step of this process. `device` is for the messages between
        processes, `num_items_of` is `Trainer`'s count of the items in batches, `is_sharded` means by FSDP2.

        Raises `ValueError` if the model is sharded and a micro-batch of one process alone has no label.
        """
        config, tasks = self.data.config, len(self.data.names)
        counts = torch.stack([self.of(batch, weighing=len(batches)) for batch in batches])
        num_items: dict[int, Any] = {}
        if self.data.splits:
            parts = [parts_of(batch, config.task_column, tasks) for batch in batches]
            any_part = next(iter(parts[0].values()))
            nothing = {key: any_part[key][:0] for key in ("labels", "shift_labels") if key in any_part}
            for task in range(tasks):
                # Trainer counts the labels of each task's parts, over all processes.
                own = [part[task] for part in parts if task in part]
                num_items[task] = num_items_of(own or [nothing], device)
        totals = sum_over_processes(counts.sum(dim=0).to(device)).cpu()
        if config.task_loss_scale == "window":
            num_items = {task: totals[task] / processes() for task in range(len(totals))}
        anywhere = any_process((counts > 0).to(device)).cpu()
        if is_sharded:
            idle = any_process((counts.sum(dim=1) == 0).to(device)).cpu()
            if bool((idle & anywhere.any(dim=1)).any()):
                raise ValueError(
                    "A micro-batch of one process has no label of any task, and with FSDP2 every process must make "
                    "the same passes: leave samples without labels out."
                )
        return Window(counts, totals, anywhere, num_items)

    def of(self, batch: Mapping[str, Any], source: Source | None = None, weighing: int = 1) -> Tensor:
        """Labels of each task in a batch, float64 `[tasks]`; `weighing`: how many batches are weighted by them."""
        tasks, column = self.data.names, self.data.config.task_column
        source = batch.get(SOURCE, source)
        if self.data.splits:
            counts = torch.zeros(len(tasks), dtype=torch.float64)
            for task, part in parts_of(batch, column, len(tasks)).items():
                counts[task] = self._of_part(part, source, task)
            return counts
        if self.data.one_per_sample:
            labelled = {**batch, **self._shifted(batch)}
            return count_labels_by_id(labelled, self.label_names, batch[column], len(tasks))
        size = source.size if source is not None else None
        found = count_labels_of_tasks(batch, self.label_names, tasks, size)
        if found is None:
            self._check_unassigned(weighing)
            found = torch.full((len(tasks),), float(size if size is not None else batch_size_of(batch)))
        return found.double()

    def _of_part(self, part: Mapping[str, Any], source: Source | None, task: int) -> float:
        """Labels of one task's part; without one tensor of labels, its samples."""
        names = self.label_names
        known = count_labels({**part, **self._shifted(part)}.get(names[0])) if len(names) == 1 else None
        if known is not None:
            return known
        return float(source.tasks.count(task) if source is not None and source.tasks else batch_size_of(part))

    def _shifted(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The labels that a causal language model's loss looks at, which Trainer counts too."""
        if self.label_names != ["labels"] or not isinstance(batch.get("labels"), Tensor):
            return {}
        if "shift_labels" in batch:
            return {"labels": batch["shift_labels"]}
        return {"labels": batch["labels"][..., 1:]} if self.shifts_labels else {}

    def _check_unassigned(self, weighing: int) -> None:
        """Raise or warn about labels that belong to no task."""
        about = f"The labels {self.label_names} do not say which of the tasks {self.data.names} they are of"
        remedy = "Give every task labels of its own in label_names, or one tensor of labels [samples, tasks]."
        if self.data.config.task_loss_scale == "window":
            raise ValueError(f"{about}, so they cannot be counted, as task_loss_scale='window' needs. {remedy}")
        if weighing * processes() > 1 and not self.has_warned:
            self.has_warned = True
            logger.warning("%s: micro-batches are weighted by their number of samples. %s", about, remedy)
