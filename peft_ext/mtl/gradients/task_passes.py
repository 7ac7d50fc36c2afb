"""Forward and backward passes, task by task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...preserve import preserved
from ..data.collation import SOURCE, parts_of
from ..data.losses import Window, checked_losses, split_labels
from ..parallel import processes, task_backward
from .probe import unheard
from .task_gradients import TaskGradients


# Task, its loss, whether it only stands in for another process's, and whether later losses need its graph.
TaskLoss: TypeAlias = tuple[int, Tensor, bool, bool]


class Passes:
    """Computes losses and gradients of one trainer, task by task."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def losses(self, model: nn.Module, inputs: Any, window: Window, index: int) -> Iterator[TaskLoss]:
        """
        The losses of micro-batch `index`, weighted so that those of a window add up to means. The loss of a stand-in
        is zero; its pass keeps FSDP2's processes in step.
        """
        raise NotImplementedError

    def backward(
        self, model: nn.Module, inputs: Any, window: Window, index: int, gradients: TaskGradients
    ) -> dict[int, Tensor]:
        """One backward pass per task, whose gradients go to `gradients`. Returns the losses by task number."""
        accelerator, losses = self.trainer.accelerator, {}
        with task_backward(accelerator, model):
            for task, loss, stands_in, keeps_graph in self.losses(model, inputs, window, index):
                accelerator.backward(loss, retain_graph=keeps_graph)
                gradients.collect(task, stands_in)
                if not stands_in:
                    losses[task] = loss.detach()
        return losses

    def replay(self, model: nn.Module, inputs: Any, window: Window, index: int) -> dict[int, Tensor]:
        """The losses by task number, of this process's tasks alone."""
        losses = self.losses(model, inputs, window, index)
        return {task: loss for task, loss, stands_in, _ in losses if not stands_in}


class PartPasses(Passes):
    """For samples of one task each: a forward and a backward pass for each task's part of a batch."""

    def losses(self, model: nn.Module, inputs: Any, window: Window, index: int) -> Iterator[TaskLoss]:
        parts = parts_of(inputs, self.trainer.args.task_column, len(self.trainer.task_names))
        counts = window.counts[index]
        smallest = min(parts, key=lambda task: (counts[task] == 0, counts[task]))
        for task in torch.nonzero(window.anywhere[index]).flatten().tolist():
            stands_in = not counts[task] > 0
            with unheard(self.trainer) if stands_in else nullcontext():
                part = parts[smallest if stands_in else task]
                loss = self._loss(model, dict(part), window, index, task)
            yield task, loss * 0.0 if stands_in else loss, stands_in, False

    def _loss(self, model: nn.Module, inputs: Any, window: Window, index: int, task: int) -> Tensor:
        """Weighted loss of one task's part of a batch."""
        trainer = self.trainer
        num_items = window.num_items.get(task)
        with trainer.compute_loss_context_manager():
            loss: Tensor = trainer.compute_loss(model, inputs, num_items_in_batch=num_items)
        is_scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if is_scaled is None:
            by_items = trainer.model_accepts_loss_kwargs or getattr(trainer, "compute_loss_func", None) is not None
            is_scaled = by_items and num_items is not None
        if not is_scaled:
            return loss * window.share(index, task, processes())
        config = trainer.args
        if processes() > 1 and not config.average_tokens_across_devices and config.task_loss_scale == "batch":
            # Divided by this process's labels, of which others may have more or none.
            loss = loss * float(window.counts[:, task].sum() / window.totals[task]) * processes()
        return loss


class LabelPasses(Passes):
    """For inputs with several labels: one forward pass, and a backward pass per task."""

    def losses(self, model: nn.Module, inputs: Any, window: Window, index: int) -> Iterator[TaskLoss]:
        scaled = self._scaled(model, inputs, window, index)
        if not scaled:  # nothing is labelled in this micro-batch
            return
        tasks = torch.nonzero(window.anywhere[index]).flatten().tolist() if processes() > 1 else list(scaled)
        for task in tasks:
            stands_in = task not in scaled
            loss = next(iter(scaled.values())) * 0.0 if stands_in else scaled[task]
            yield task, loss, stands_in, task != tasks[-1]

    def backward_sum(
        self, model: nn.Module, inputs: Any, window: Window, index: int, reduction: str
    ) -> dict[int, Tensor]:
        """
        One backward pass for all tasks together, into `.grad`. Gradients are averaged over processes at the end of the
        step, since each process may lack other tasks.
        """
        accelerator = self.trainer.accelerator
        with task_backward(accelerator, model) if processes() > 1 else nullcontext():
            scaled = self._scaled(model, inputs, window, index)
            if scaled:
                share = 1.0 / int(window.present.sum()) if reduction == "mean" else 1.0
                accelerator.backward(torch.stack(list(scaled.values())).sum() * share)
        return scaled

    def _scaled(self, model: nn.Module, inputs: Any, window: Window, index: int) -> dict[int, Tensor]:
        """Weighted losses by task number."""
        trainer, names = self.trainer, self.trainer.task_names
        named = None
        if trainer.args.task_loss_scale == "window":
            named = {name: window.num_items[task] for task, name in enumerate(names)}
        with trainer.compute_loss_context_manager():
            losses = trainer.compute_task_losses(model, inputs, num_items_in_batch=named)
        unknown = sorted(set(losses) - set(names))
        if unknown:
            raise ValueError(
                f"There is a loss for {unknown[0]!r}, which is not one of the tasks {names}; set task_names in the "
                "config to all of them."
            )
        scaled = {}
        for task, name in enumerate(names):
            if name in losses and window.counts[index, task] > 0:
                weight = 1.0 if named is not None else window.share(index, task, processes())
                scaled[task] = losses[name] * weight
        return scaled


def losses_and_outputs(
    trainer: Any, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
) -> tuple[dict[str, Tensor], Any]:
    """
    Losses of one input with several labels, by the trainer's `compute_task_losses_func` or from the model's output
    `task_losses`.

    Returns:
        `tuple`: a scalar per task that the batch has, and the model's outputs.

    Raises:
        `ValueError`: if nothing gives losses per task, or they are not scalar tensors.
    """
    column, names, function = trainer.args.task_column, trainer.label_names or [], trainer.compute_task_losses_func
    has_ids = column in inputs
    if column not in names:
        inputs = {key: value for key, value in inputs.items() if key != column}
    if function is not None:
        inputs, labels = split_labels(inputs, names)
        outputs = model(**inputs)
        losses = function(outputs, labels, num_items_in_batch=num_items_in_batch)
        return checked_losses(losses, "compute_task_losses_func's result"), outputs
    outputs = model(**inputs)
    losses = outputs.get("task_losses") if isinstance(outputs, dict) else None
    losses = losses if losses is not None else getattr(outputs, "task_losses", None)
    if losses is None and has_ids:
        raise ValueError(
            f"Batches have {column!r}, but the training set does not show every sample's: pass train_dataset as a "
            f"dict of data sets or as a datasets.Dataset with that column, not as "
            f"{type(getattr(trainer, 'train_dataset', None)).__name__}."
        )
    if losses is None:
        raise ValueError(
            "No losses per task: give compute_task_losses_func, let the model return `task_losses`, pass "
            f"train_dataset as a dict of data sets, or add a column {column!r} to it."
        )
    return checked_losses(losses, "outputs.task_losses"), outputs


def names_of_losses(trainer: Any, batch: Any) -> list[str]:
    """
    Learn the tasks' names from the losses of one batch, leaving the random streams as they were.

    Raises:
        `ValueError`: if the names are needed before, or other processes may learn other ones.
    """
    if trainer.args.task_loss_scale == "window" or processes() > 1:
        raise ValueError("Set task_names in the config: they are needed before the first losses are computed.")
    model = trainer.accelerator.unwrap_model(trainer.model)
    with preserved(model, training=False), torch.no_grad(), trainer.compute_loss_context_manager():
        inputs = trainer._prepare_inputs(batch)
        inputs.pop(SOURCE, None)
        return list(trainer.compute_task_losses(model, inputs))
