"""Evaluation task by task: `eval_<task>_loss` beside the mean of the tasks' losses."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher

from .data.collation import PARTS, SOURCE, Source, parts_of
from .gradients.probe import unlogged
from .parallel import any_process, processes, sum_over_processes


logger = logging.getLogger(__name__)


class TaskEvaluation:
    """
    Adds up the tasks' losses over an evaluation.

    Args:
        trainer ([`MTLTrainerMixin`]): whose model, tasks and losses.

    Attributes:
        totals (`dict[str, list[float]]`, *optional*): per task, the sum of its losses weighted by labels, and its
            labels; `None` outside an evaluation.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.totals: dict[str, list[float]] | None = None
        self.beside: dict[str, Any] = {}  # what a batch has that the model does not take

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the losses of one evaluation."""
        self.totals = {}
        try:
            yield
        finally:
            self.totals = None

    def metrics(self, prefix: str) -> dict[str, float]:
        """The tasks' mean losses in all processes, and the mean over tasks where batches have several."""
        data = self.trainer.task_data
        if data.known is None or self.totals is None:
            return {}
        rows = [self.totals.get(task, [0.0, 0.0]) for task in data.known]
        totals = sum_over_processes(torch.tensor(rows, dtype=torch.float64).to(self.trainer.args.device)).cpu()
        means = {task: total / n for task, (total, n) in zip(data.known, totals.tolist(), strict=True) if n}
        metrics = {f"{prefix}_{task}_loss": loss for task, loss in means.items()}
        if not data.splits and means:
            # Every task counts the same, however many labels a batch has of it.
            metrics[f"{prefix}_loss"] = sum(means.values()) / len(means)
        return metrics

    def step(self, predict: Callable[[Any], Any], model: Any, inputs: Any) -> Any:
        """Predict a batch without the parts of its tasks, then evaluate the parts."""
        splits = self.trainer.task_data.splits
        hidden = (PARTS, SOURCE, self.trainer.args.task_column) if splits else (SOURCE,)
        self.beside = {key: inputs[key] for key in hidden if key in inputs}
        bare = copy.copy(inputs)
        for key in self.beside:
            bare.pop(key)
        try:
            result = predict(copy.copy(bare))
        finally:
            beside, self.beside = self.beside, {}
        if splits and self.totals is not None and beside and result[0] is not None:
            with torch.no_grad(), self.trainer.compute_loss_context_manager():
                self._add_parts(model, bare, beside, result[0])
        return result

    def mean_of_tasks(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """Mean of the tasks' losses of a batch, and the model's outputs if asked for."""
        source = self.beside.get(SOURCE)
        losses, outputs = self._losses(model, inputs, source)
        loss = torch.stack([loss for loss, _ in losses.values()]).mean() if losses else None
        if self.totals is not None:
            kept = self._counted(source)
            if kept is not None and source is not None:
                collate = self.trainer.task_collator(training=False)
                batch = self.trainer._prepare_inputs(collate(kept or source.samples))
                losses, _ = self._losses(model, batch, batch.pop(SOURCE))
            for name, counted in losses.items() if kept is None or kept else ():
                self._add(name, *counted)
        if loss is None:  # nothing is labelled in this batch; `metrics` replaces the mean over batches
            loss = torch.tensor(0.0, device=self.trainer.args.device)
        if not return_outputs:
            return loss
        if isinstance(outputs, dict):
            return loss, {key: value for key, value in outputs.items() if key != "task_losses"}
        # Trainer takes what follows the loss for predictions.
        return loss, (loss, *(outputs if isinstance(outputs, (tuple, list)) else (outputs,)))

    def _add_parts(self, model: Any, inputs: Any, beside: dict[str, Any], loss: Any) -> None:
        """Add the losses of a batch's tasks; in several processes, all make the same passes."""
        trainer, source = self.trainer, beside.get(SOURCE)
        if source is not None and source.tasks is None:  # one task's own data set
            return
        batch = {**inputs, **beside}
        kept = self._counted(source)
        if kept is not None:
            batch = trainer.task_collator()(kept) if kept else {PARTS: {}}
        parts = parts_of(batch, trainer.args.task_column, len(trainer.task_names))
        counts = trainer.task_counts.of(batch)
        there = (counts > 0).to(trainer.args.device)
        for task in torch.nonzero(any_process(there)).flatten().tolist():
            own = loss
            if processes() > 1 or len(parts) > 1:
                with unlogged(trainer):
                    own = trainer.compute_loss(model, trainer._prepare_inputs(dict(parts.get(task, inputs))))
            if float(counts[task]) > 0:
                self._add(trainer.task_names[task], own, float(counts[task]))

    def _counted(self, source: Source | None) -> list[Any] | None:
        """
        The samples that count of a process's last batch, which accelerate fills up with samples of the first; in all
        processes alike. `None` where the whole batch counts.
        """
        loader = self.trainer.accelerator.gradient_state.active_dataloader
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
        return source.samples[: max(0, loader.remainder - self.trainer.args.process_index * source.size)]

    def _losses(
        self, model: Any, inputs: dict[str, Any], source: Source | None
    ) -> tuple[dict[str, tuple[Any, float]], Any]:
        """Loss and number of labels of each task that a batch has labels of, and what the model returned."""
        trainer = self.trainer
        counts = dict(zip(trainer.task_names, trainer.task_counts.of(inputs, source), strict=True))
        num_items = counts if trainer.args.task_loss_scale == "window" else None
        losses, outputs = trainer.compute_task_losses(model, inputs, num_items, return_outputs=True)
        labelled = {name: float(count) for name, count in counts.items() if name in losses and count > 0}
        return {name: (losses[name], count) for name, count in labelled.items()}, outputs

    def _add(self, task: str, loss: Any, count: float) -> None:
        assert self.totals is not None
        total = self.totals.setdefault(task, [0.0, 0.0])
        total[0] += float(loss.detach()) * count
        total[1] += count
