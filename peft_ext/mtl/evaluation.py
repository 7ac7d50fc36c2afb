"""Evaluation task by task."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import DataLoaderDispatcher

from .data.collation import PARTS, SOURCE, Source, parts_of
from .parallel import any_process, processes, sum_over_processes


if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = logging.getLogger(__name__)


class TaskEvaluationMixin(_Trainer):
    """Part of [`MTLTrainerMixin`]: `eval_<task>_loss` beside the mean of the tasks' losses."""

    task_names: Any
    compute_task_losses: Any
    _splits: bool
    _counts_of: Any
    _unlogged: Any
    task_collator: Any
    _beside: dict[str, Any] = {}
    _eval_losses: dict[str, list[float]] | None = None

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, on the batch without the tasks' parts of it, which follow."""
        hidden = (PARTS, SOURCE, self.args.task_column) if self._splits else (SOURCE,)
        self._beside = {key: inputs[key] for key in hidden if key in inputs}
        bare = copy.copy(inputs)
        for key in self._beside:
            bare.pop(key)
        try:
            result = super().prediction_step(model, copy.copy(bare), *args, **kwargs)
        finally:
            beside, self._beside = self._beside, {}
        if self._splits and self._eval_losses is not None and beside and result[0] is not None:
            with torch.no_grad(), self.compute_loss_context_manager():
                self._add_parts(model, bare, beside, result[0])
        return result

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of the tasks' losses of a batch; for samples of one task each, the loss of the whole batch."""
        if not self._splits:
            return self._mean_of_tasks(model, inputs, return_outputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _add_parts(self, model: Any, inputs: Any, beside: dict[str, Any], loss: Any) -> None:
        """Add the losses of a batch's tasks; in several processes, all make the same passes."""
        source = beside.get(SOURCE)
        if source is not None and source.tasks is None:  # one task's own data set
            return
        batch = {**inputs, **beside}
        kept = self._counted(source)
        if kept is not None:
            batch = self.task_collator()(kept) if kept else {PARTS: {}}
        parts = parts_of(batch, self.args.task_column, len(self.task_names))
        counts = self._counts_of(batch)
        there = (counts > 0).to(self.args.device)
        for task in torch.nonzero(any_process(there)).flatten().tolist():
            own = loss
            if processes() > 1 or len(parts) > 1:
                with self._unlogged():
                    own = self.compute_loss(model, self._prepare_inputs(dict(parts.get(task, inputs))))
            if float(counts[task]) > 0:
                self._add(self.task_names[task], own, float(counts[task]))

    def _counted(self, source: Source | None) -> list[Any] | None:
        """
        The samples that count of a process's last batch, which accelerate fills up with samples of the first; in all
        processes alike. `None` where the whole batch counts.
        """
        loader = self.accelerator.gradient_state.active_dataloader
        if processes() == 1 or loader is None or not loader.end_of_dataloader or loader.remainder <= 0:
            return None
        if source is None or source.samples is None:
            if not isinstance(loader, DataLoaderDispatcher) or loader.remainder % processes():
                logger.warning(
                    "The last batches repeat samples of the first ones, which count twice in the tasks' evaluation "
                    "losses: the data loader does not pass its samples on. Collate with "
                    "trainer.task_collator(training=False), or give a map-style data set."
                )
            return None
        return source.samples[: max(0, loader.remainder - self.args.process_index * source.size)]

    def _mean_of_tasks(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        source = self._beside.get(SOURCE)
        losses, counts, outputs = self._losses_and_counts(model, inputs, source)
        there = {name: loss for name, loss in losses.items() if counts[name] > 0}
        if self._eval_losses is not None:
            kept = self._counted(source)
            if kept is not None and source is not None:
                batch = self._prepare_inputs(self.task_collator(training=False)(kept or source.samples))
                losses, counts, _ = self._losses_and_counts(model, batch, batch.pop(SOURCE))
            for name, loss in losses.items():
                if counts[name] > 0 and (kept is None or kept):
                    self._add(name, loss, counts[name])
        # Nothing is labelled in some batches; `evaluation_loop` replaces the mean over batches.
        loss = torch.stack(list(there.values())).mean() if there else torch.tensor(0.0, device=self.args.device)
        if not return_outputs:
            return loss
        if isinstance(outputs, dict):
            return loss, {key: value for key, value in outputs.items() if key != "task_losses"}
        # Trainer takes what follows the loss for predictions.
        return loss, (loss, *(outputs if isinstance(outputs, (tuple, list)) else (outputs,)))

    def _losses_and_counts(
        self, model: Any, inputs: dict[str, Any], source: Source | None
    ) -> tuple[dict[str, Any], dict[str, float], Any]:
        """The tasks' losses of a batch, how many labels each has in it, and what the model returned."""
        counts = dict(zip(self.task_names, self._counts_of(inputs, source), strict=True))
        num_items = counts if self.args.task_loss_scale == "window" else None
        losses, outputs = self.compute_task_losses(model, inputs, num_items, return_outputs=True)
        named = {name: losses[name] for name in self.task_names if name in losses}
        return named, {name: float(count) for name, count in counts.items()}, outputs

    def _add(self, task: str, loss: Any, count: float) -> None:
        assert self._eval_losses is not None
        total = self._eval_losses.setdefault(task, [0.0, 0.0])
        total[0] += float(loss.detach()) * count
        total[1] += count

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with the loss of every task added to the metrics."""
        self._eval_losses = {}
        try:
            output = super().evaluation_loop(*args, **kwargs)
            prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
            if self._task_names_known():
                rows = [self._eval_losses.get(task, [0.0, 0.0]) for task in self.task_names]
                totals = sum_over_processes(torch.tensor(rows, dtype=torch.float64).to(self.args.device)).cpu()
                means = {
                    task: total / n for task, (total, n) in zip(self.task_names, totals.tolist(), strict=True) if n
                }
                output.metrics.update({f"{prefix}_{task}_loss": loss for task, loss in means.items()})
                if not self._splits and means:
                    # Every task counts the same, however many labels a batch has of it.
                    output.metrics[f"{prefix}_loss"] = sum(means.values()) / len(means)
        finally:
            self._eval_losses = None
        return output

    def _task_names_known(self) -> bool:
        return getattr(self, "_task_names", None) is not None
