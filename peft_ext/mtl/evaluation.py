"""Evaluation task by task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .data import rows_of
from .parallel import sum_over_processes


if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class TaskEvaluationMixin(_Trainer):
    """Part of [`MTLTrainerMixin`]: `eval_<task>_loss` beside the mean of the tasks' losses."""

    task_names: Any
    compute_task_losses: Any
    _splits: bool
    _counts_of: Any
    _unlogged: Any
    _eval_losses: dict[str, list[float]] | None = None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of the tasks' losses of a batch; for samples of one task each, the loss of the whole batch."""
        if not self._splits:
            return self._mean_of_tasks(model, inputs, return_outputs)
        ids = inputs.get(self.args.task_column)
        bare = {key: value for key, value in inputs.items() if key != self.args.task_column}
        kwargs = {"num_items_in_batch": num_items_in_batch}
        result = super().compute_loss(model, dict(bare), return_outputs=return_outputs, **kwargs)
        if ids is not None and self._eval_losses is not None:
            tasks = ids.unique().tolist()
            for task in tasks:
                rows = torch.nonzero(ids == task).flatten()
                if len(tasks) == 1:
                    loss = result[0] if return_outputs else result
                else:
                    with self._unlogged():
                        loss = super().compute_loss(model, rows_of(bare, rows, len(ids)))
                self._add(self.task_names[task], loss, len(rows))
        return result

    def _mean_of_tasks(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        num_items = None
        counts = self._counts_of(inputs)
        if self.args.task_loss_scale == "window":
            num_items = dict(zip(self.task_names, counts, strict=True))
        losses, outputs = self.compute_task_losses(model, inputs, num_items, return_outputs=True)
        there = {
            name: losses[name] for i, name in enumerate(self.task_names) if name in losses and float(counts[i]) > 0
        }
        for i, name in enumerate(self.task_names):
            if name in there and self._eval_losses is not None:
                self._add(name, there[name], float(counts[i]))
        # Nothing is labelled in some batches; `evaluation_loop` replaces the mean over batches.
        loss = torch.stack(list(there.values())).mean() if there else torch.tensor(0.0, device=self.args.device)
        if not return_outputs:
            return loss
        if isinstance(outputs, dict):
            return loss, {key: value for key, value in outputs.items() if key != "task_losses"}
        # Trainer takes what follows the loss for predictions.
        return loss, (loss, *(outputs if isinstance(outputs, (tuple, list)) else (outputs,)))

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
