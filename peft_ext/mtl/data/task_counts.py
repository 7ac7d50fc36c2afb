"""What one optimiser step has of each task: labels, and whatever else `Trainer` counts in its batches."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...sparse.bases.sharded import is_sharded
from ..parallel import any_process, processes, sum_over_processes
from .collation import PARTS, SOURCE, Source, batch_size_of, parts_of
from .losses import Window, count_labels, count_labels_by_id, count_labels_of_tasks


if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = logging.getLogger(__name__)


class TaskCountsMixin(_Trainer):
    """Part of [`MTLTrainerMixin`]: counting."""

    task_names: Any
    _splits: bool
    _one_task_per_sample: bool
    _warned_of_labels = False

    def _measure(self, batches: list[Any], device: Any) -> Window:
        counts = torch.stack([self._counts_of(batch, weighing=len(batches)) for batch in batches])
        num_items: dict[int, Any] = {}
        if self._splits:
            parts = [parts_of(batch, self.args.task_column, len(self.task_names)) for batch in batches]
            any_part = next(iter(parts[0].values()))
            nothing = {key: any_part[key][:0] for key in ("labels", "shift_labels") if key in any_part}
            for task in range(len(self.task_names)):
                # Trainer counts the labels of each task's parts, over all processes.
                own = [part[task] for part in parts if task in part]
                num_items[task] = self._get_num_items_in_batch(own or [nothing], device)
        totals = sum_over_processes(counts.sum(dim=0).to(device)).cpu()
        if self.args.task_loss_scale == "window":
            num_items = {task: totals[task] / processes() for task in range(len(totals))}
        anywhere = any_process((counts > 0).to(device)).cpu()
        if any(is_sharded(parameter) for parameter in self.model.parameters()):
            idle = any_process((counts.sum(dim=1) == 0).to(device)).cpu()
            if bool((idle & anywhere.any(dim=1)).any()):
                raise ValueError(
                    "A micro-batch of one process has no label of any task, and with FSDP2 every process must make "
                    "the same passes: leave samples without labels out."
                )
        return Window(counts, totals, anywhere, num_items)

    def _counts_of(self, batch: Mapping[str, Any], source: Source | None = None, weighing: int = 1) -> Tensor:
        """Labels of each task in a batch, float64 `[tasks]`; `weighing`: how many batches are weighted by them."""
        tasks, column = self.task_names, self.args.task_column
        names = [name for name in self.label_names or () if name != column]
        source = batch.get(SOURCE, source)
        if self._splits:
            counts = torch.zeros(len(tasks), dtype=torch.float64)
            for task, part in parts_of(batch, column, len(tasks)).items():
                counts[task] = self._count_part(part, names, source, task)
            return counts
        if self._one_task_per_sample:
            return count_labels_by_id({**batch, **self._shifted(batch, names)}, names, batch[column], len(tasks))
        size = source.size if source is not None else None
        found = count_labels_of_tasks(batch, names, tasks, size)
        if found is None:
            self._labels_of_no_task(names, weighing)
            found = torch.full((len(tasks),), float(size if size is not None else batch_size_of(batch)))
        return found.double()

    def _count_part(self, part: Mapping[str, Any], names: list[str], source: Source | None, task: int) -> float:
        """Labels of one task's part; without one tensor of labels, its samples."""
        known = count_labels({**part, **self._shifted(part, names)}.get(names[0])) if len(names) == 1 else None
        if known is not None:
            return known
        return float(source.tasks.count(task) if source is not None and source.tasks else batch_size_of(part))

    def _shifted(self, batch: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
        """The labels that a causal language model's loss looks at, which Trainer counts too."""
        if names != ["labels"] or not isinstance(batch.get("labels"), Tensor):
            return {}
        if "shift_labels" in batch:
            return {"labels": batch["shift_labels"]}
        return {"labels": batch["labels"][..., 1:]} if getattr(self, "_loss_shifts_labels", False) else {}

    def _labels_of_no_task(self, names: list[str], weighing: int) -> None:
        about = f"The labels {names} do not say which of the tasks {self.task_names} they are of"
        remedy = "Give every task labels of its own in label_names, or one tensor of labels [samples, tasks]."
        if self.args.task_loss_scale == "window":
            raise ValueError(f"{about}, so they cannot be counted, as task_loss_scale='window' needs. {remedy}")
        if weighing * processes() > 1 and not self._warned_of_labels:
            self._warned_of_labels = True
            logger.warning("%s: micro-batches are weighted by their number of samples. %s", about, remedy)

    # ------------------------------------------------------------------ what Trainer counts

    def _joined(self, inputs: Any) -> Any:
        """Of a batch in parts, what Trainer counts tokens by, as one."""
        if PARTS not in inputs:
            return inputs
        parts = list(inputs[PARTS].values())
        names = (getattr(self.model, "main_input_name", "input_ids"), "attention_mask")
        return {
            name: torch.cat([part[name].reshape(-1) for part in parts])
            for name in names
            if all(isinstance(part.get(name), Tensor) for part in parts)
        }

    def floating_point_ops(self, inputs: Any) -> int:
        """Trainer's, of all parts."""
        return super().floating_point_ops(self._joined(inputs))

    def _track_num_input_tokens(self, inputs: Any) -> None:
        super()._track_num_input_tokens(self._joined(inputs))
