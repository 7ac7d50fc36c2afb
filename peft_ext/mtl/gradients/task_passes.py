"""Forward and backward passes, task by task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.collation import parts_of
from ..data.losses import Window, checked_losses, split_labels
from ..parallel import processes, task_backward
from .probe import unheard


if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class TaskPassesMixin(_Trainer):
    """Part of [`MTLTrainerMixin`]: from micro-batches to losses and gradients."""

    task_names: Any
    aggregator: Any
    compute_task_losses_func: Any
    _splits: bool
    _window: Window | None
    _gradients: Any

    def compute_task_losses(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None, return_outputs: bool = False
    ) -> Any:
        """
        Losses of one input with several labels. Override it, or give `compute_task_losses_func`, or let the model
        return `task_losses`.

        Args:
            model (`nn.Module`): the model.
            inputs (`dict`): one micro-batch.
            num_items_in_batch (`dict[str, torch.Tensor]`, *optional*): labels per task in the accumulation window,
                with `task_loss_scale="window"`.
            return_outputs (`bool`): whether to return the model's outputs too.

        Returns:
            `dict[str, torch.Tensor]`: a scalar per task that the batch has.
        """
        column, names = self.args.task_column, self.label_names or []
        has_ids = column in inputs
        if column not in names:
            inputs = {key: value for key, value in inputs.items() if key != column}
        if self.compute_task_losses_func is not None:
            inputs, labels = split_labels(inputs, names)
            outputs = model(**inputs)
            losses = self.compute_task_losses_func(outputs, labels, num_items_in_batch=num_items_in_batch)
            checked = checked_losses(losses, "compute_task_losses_func's result")
        else:
            outputs = model(**inputs)
            losses = outputs.get("task_losses") if isinstance(outputs, dict) else None
            losses = losses if losses is not None else getattr(outputs, "task_losses", None)
            if losses is None and has_ids:
                raise ValueError(
                    f"Batches have {column!r}, but the training set does not show every sample's: pass train_dataset "
                    f"as a dict of data sets or as a datasets.Dataset with that column, not as "
                    f"{type(getattr(self, 'train_dataset', None)).__name__}."
                )
            if losses is None:
                raise ValueError(
                    "No losses per task: give compute_task_losses_func, let the model return `task_losses`, pass "
                    f"train_dataset as a dict of data sets, or add a column {self.args.task_column!r} to it."
                )
            checked = checked_losses(losses, "outputs.task_losses")
        return (checked, outputs) if return_outputs else checked

    def _scaled_losses(self, model: nn.Module, inputs: Any, index: int) -> dict[int, Tensor]:
        """Losses by task number, each weighted so that they add up to the window's mean."""
        assert self._window is not None
        named = None
        if self.args.task_loss_scale == "window":
            named = {name: self._window.num_items[task] for task, name in enumerate(self.task_names)}
        with self.compute_loss_context_manager():
            losses = self.compute_task_losses(model, inputs, num_items_in_batch=named)
        unknown = sorted(set(losses) - set(self.task_names))
        if unknown:
            raise ValueError(
                f"There is a loss for {unknown[0]!r}, which is not one of the tasks {self.task_names}; set task_names "
                "in the config to all of them."
            )
        scaled = {}
        for task, name in enumerate(self.task_names):
            if name in losses and self._window.counts[index, task] > 0:
                weight = 1.0 if named is not None else self._window.share(index, task, processes())
                scaled[task] = losses[name] * weight
        return scaled

    def _part_loss(self, model: nn.Module, inputs: Any, index: int, task: int) -> Tensor:
        """Weighted loss of one task's part of a batch of several tasks."""
        assert self._window is not None
        num_items = self._window.num_items.get(task)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items)
        is_scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if is_scaled is None:
            by_items = self.model_accepts_loss_kwargs or getattr(self, "compute_loss_func", None) is not None
            is_scaled = by_items and num_items is not None
        if not is_scaled:
            return loss * self._window.share(index, task, processes())
        if processes() > 1 and not self.args.average_tokens_across_devices and self.args.task_loss_scale == "batch":
            # Divided by this process's labels, of which others may have more or none.
            loss = loss * float(self._window.counts[:, task].sum() / self._window.totals[task]) * processes()
        return loss

    def _parts(self, inputs: Mapping[str, Any], index: int) -> Iterator[tuple[int, dict[str, Any], bool]]:
        """Task, its part of the batch, and whether that only stands in for another process's."""
        assert self._window is not None
        parts = parts_of(inputs, self.args.task_column, len(self.task_names))
        counts = self._window.counts[index]
        smallest = min(parts, key=lambda task: (counts[task] == 0, counts[task]))
        for task in torch.nonzero(self._window.anywhere[index]).flatten().tolist():
            stands_in = not counts[task] > 0
            yield task, dict(parts[smallest if stands_in else task]), stands_in

    def _backward_sum(self, model: nn.Module, inputs: Any, index: int) -> dict[int, Tensor]:
        """One backward pass; gradients are averaged over processes at the end, since each may lack other tasks."""
        assert self._window is not None
        with task_backward(self.accelerator, model) if processes() > 1 else nullcontext():
            scaled = self._scaled_losses(model, inputs, index)
            if scaled:
                share = 1.0 / int(self._window.present.sum()) if self.aggregator.reduction == "mean" else 1.0
                self.accelerator.backward(torch.stack(list(scaled.values())).sum() * share)
        return scaled

    def _backward_tasks(self, model: nn.Module, inputs: Any, index: int) -> dict[int, Tensor]:
        """One forward pass, one backward pass per task."""
        assert self._window is not None and self._gradients is not None
        with task_backward(self.accelerator, model):
            scaled = self._scaled_losses(model, inputs, index)
            if not scaled:  # nothing is labelled in this micro-batch
                return {}
            tasks = torch.nonzero(self._window.anywhere[index]).flatten().tolist() if processes() > 1 else list(scaled)
            for task in tasks:
                stands_in = task not in scaled  # FSDP2's processes must make the same passes
                loss = next(iter(scaled.values())) * 0.0 if stands_in else scaled[task]
                self.accelerator.backward(loss, retain_graph=task != tasks[-1])
                self._gradients.collect(task, stands_in)
        return scaled

    def _backward_parts(self, model: nn.Module, inputs: Any, index: int) -> dict[int, Tensor]:
        """A forward and a backward pass for each task's part of the batch."""
        assert self._gradients is not None
        losses: dict[int, Tensor] = {}
        for task, part, stands_in in self._parts(inputs, index):
            with task_backward(self.accelerator, model):
                with unheard(self) if stands_in else nullcontext():
                    loss = self._part_loss(model, part, index, task)
                if stands_in:
                    loss = loss * 0.0
                else:
                    losses[task] = loss.detach()
                self.accelerator.backward(loss)
            self._gradients.collect(task, stands_in)
        return losses

    def _as_array(self, losses: Mapping[int, Tensor]) -> np.ndarray[Any, Any]:
        """float64 `[tasks]`; zero for tasks that the micro-batch does not have."""
        values = np.zeros(len(self.task_names))
        if losses:
            values[list(losses)] = torch.stack([loss.detach().float() for loss in losses.values()]).double().tolist()
        return values

    def _replayed_losses(self, model: nn.Module, inputs: Any, index: int) -> np.ndarray[Any, Any]:
        """The losses of a micro-batch alone, float64 `[tasks]`."""
        if not self._splits:
            return self._as_array(self._scaled_losses(model, inputs, index))
        parts = self._parts(inputs, index)
        losses = {task: (self._part_loss(model, part, index, task), stands_in) for task, part, stands_in in parts}
        return self._as_array({task: loss for task, (loss, stands_in) in losses.items() if not stands_in})
