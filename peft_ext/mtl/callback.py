"""A callback that measures gradient conflicts in any `Trainer`, without changing its training by a bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from ..sparse.bases.sharded import is_sharded
from .conflicts.recorder import ConflictRecorder
from .data.collation import TaskCollator, halves_of
from .data.losses import checked_losses
from .gradients.probe import collect_rows, cosines_of_halves, undisturbed
from .gradients.task_gradients import TaskGradients
from .parallel import processes


TaskLosses = Callable[[nn.Module, Any], Mapping[str, Tensor]]


class GradientConflictCallback(TrainerCallback):
    """
    Callback that records how often the gradients of several tasks conflict while any `Trainer` trains.

    Two tasks conflict where the cosine between their gradients is negative (Zhang et al., [Proactive Gradient Conflict
    Mitigation in Multi-Task Learning](https://arxiv.org/abs/2411.18615)). Every `every_n_steps` optimiser steps, the
    gradients are computed by one backward pass per task on the probe batch. They never reach the optimiser. Random
    streams, buffers and gradients are restored, so that the training is the same bit for bit.

    Args:
        probe (`dict` or `list`):
            The probe batch: one batch for all tasks, with `task_losses_func`, or a dict with one batch per task, whose
            loss the model returns. With `data_collator`, pass a list of samples in place of each batch.
        task_losses_func (`Callable`, *optional*):
            `f(model, batch) -> dict` with one scalar loss per task.
        every_n_steps (`int`, *optional*, defaults to 10):
            Number of steps between measurements. Each measurement costs about as much as one training step per task.
        scope (`str`, *optional*):
            Regular expression for the names of the parameters to measure. By default the trainable ones that more than
            one task reaches.
        layerwise (`bool`, *optional*, defaults to `False`):
            Whether to record the conflicts of each layer too.
        noise_floor (`bool`, *optional*, defaults to `False`):
            Whether to compare two halves of each task's batch too. The result shows how often noise alone makes
            gradients conflict. It needs samples, because the rows of a collated batch need not be samples.
        output_file (`str`, *optional*, defaults to `"gradient_conflicts.jsonl"`):
            Name of the file in the trainer's `output_dir`. An empty name writes none.
        data_collator (`Callable`, *optional*):
            Makes a batch of a list of samples, once for the whole training.

    Raises:
        `ValueError`: If an argument is malformed, or `noise_floor` is given collated batches.

    Attributes:
        recorder ([`ConflictRecorder`]):
            The measurements, from the first one on.

    Usage:

        ```python
        from peft_ext.mtl import GradientConflictCallback, log_gradient_conflicts

        probe = {"math": math_samples, "code": code_samples}
        callback = GradientConflictCallback(probe, every_n_steps=10, noise_floor=True, data_collator=collator)
        log_gradient_conflicts(trainer, callback)  # so that TensorBoard and Weights & Biases show the values
        trainer.train()
        print(callback.recorder.summary())
        ```
    """

    def __init__(
        self,
        probe: Mapping[str, Any] | Sequence[Any],
        task_losses_func: TaskLosses | None = None,
        every_n_steps: int = 10,
        scope: str | None = None,
        layerwise: bool = False,
        noise_floor: bool = False,
        output_file: str = "gradient_conflicts.jsonl",
        data_collator: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps!r} must be at least 1.")
        kinds = (Mapping,) if data_collator is None else (Mapping, list, tuple)
        batches = (
            [probe] if task_losses_func is not None else list(probe.values()) if isinstance(probe, Mapping) else []
        )
        if not batches or not all(isinstance(batch, kinds) and batch for batch in batches):
            raise ValueError(
                "probe must be a batch with task_losses_func, or a dict of one batch per task; a list of samples in "
                f"place of a batch needs data_collator. It is {probe!r:.80}."
            )
        if noise_floor and any(isinstance(batch, Mapping) for batch in batches):
            raise ValueError(
                "noise_floor=True compares halves of the probe's samples, and rows of a collated batch need not be "
                "samples (pixel_values may have a row per image). Give lists of samples, and data_collator."
            )
        self.probe = probe
        self.task_losses_func = task_losses_func
        self.every_n_steps = every_n_steps
        self.scope = scope
        self.layerwise = layerwise
        self.noise_floor = noise_floor
        self.output_file = output_file
        self.collator = None if data_collator is None else TaskCollator(data_collator, "")
        self.batches: dict[tuple[Any, bool], list[Any]] = {}  # collated
        self.recorder: ConflictRecorder | None = None
        self.resumed = 0

    # ------------------------------------------------------------------ events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recorder = None
        self.resumed = state.global_step  # the file has the steps before it

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (state.global_step + 1) % self.every_n_steps == 0:
            self.measure(kwargs["model"], args, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.recorder is None or logs is None:
            return
        if "loss" in logs:
            new = self.recorder.logs(state.max_steps)
        elif "train_runtime" in logs:
            new = self.recorder.summary(state.max_steps)
        else:
            return
        logs.update(new)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(new)  # Trainer filed a copy before it called us

    # ------------------------------------------------------------------ measuring

    def measure(self, model: nn.Module, args: Any, state: Any) -> None:
        """Record the conflicts of the model in its present state."""
        # DDP's wrapper would average over processes by itself.
        bare: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        if any(is_sharded(parameter) for parameter in bare.parameters()):
            raise ValueError("GradientConflictCallback does not work with FSDP; MTLTrainer records conflicts there.")
        device = next(bare.parameters()).device
        with undisturbed(bare, self.collator and self.collator.collator):
            found = self._losses(bare, device, halves=False)
            if self.recorder is None:
                names = [str(name) for name in self.probe]
                if self.task_losses_func is not None:  # they come from one forward pass
                    kept = list(found)
                    names, found = [name for _, name, _ in kept], iter(kept)
                path = os.path.join(args.output_dir, self.output_file) if self.output_file else None
                self.recorder = ConflictRecorder(names, path if args.should_save else None)
                if self.resumed:
                    self.recorder.read_back(self.resumed)
            tasks = self.recorder.tasks
            rows = TaskGradients.of_model(bare, len(tasks), self.scope, by_layer=self.layerwise)
            values = np.full(len(tasks), np.nan)
            for _, name, loss in found:
                if name not in tasks:
                    raise ValueError(f"task_losses_func returned a loss for {name!r}, which was not among {tasks}.")
                values[tasks.index(name)] = float(loss.detach())
                collect_rows(rows, [(tasks.index(name), loss)])
            rows.reduce()
            gramian, layers = rows.gramian()
            floor = self._floor(bare, device, rows) if self.noise_floor else None
        epoch = state.epoch or 0.0
        self.recorder.record(state.global_step + 1, epoch, gramian, values, layers=layers, floor=floor)

    def _floor(self, model: nn.Module, device: torch.device, rows: TaskGradients) -> np.ndarray[Any, Any]:
        assert self.recorder is not None
        tasks, losses = self.recorder.tasks, self._losses(model, device, halves=True)
        return cosines_of_halves(rows, ((2 * tasks.index(name) + half, loss) for half, name, loss in losses))

    def _losses(self, model: nn.Module, device: torch.device, halves: bool) -> Iterator[tuple[int, str, Tensor]]:
        """Half, task and loss; the whole batch counts as half 0."""
        probe: Any = self.probe
        groups = [(None, probe)] if self.task_losses_func is not None else list(probe.items())
        for name, given in groups:
            for half, batch in enumerate(self._collated(name, given, halves)):
                piece = send_to_device(dict(batch), device)
                if self.task_losses_func is not None:
                    losses = checked_losses(self.task_losses_func(model, piece), "task_losses_func's result")
                else:
                    outputs = model(**piece)
                    loss = outputs.get("loss") if isinstance(outputs, dict) else None
                    if loss is None:
                        raise ValueError(
                            f"The model returns no loss for probe[{name!r}]: add its labels, or give task_losses_func."
                        )
                    losses = {str(name): loss}
                for task, loss in losses.items():
                    yield half, task, loss

    def _collated(self, name: Any, given: Any, halves: bool) -> list[Any]:
        if self.collator is None or isinstance(given, Mapping):
            return [given]
        if (name, halves) not in self.batches:
            pieces = [piece for piece in halves_of(given) if piece] if halves else [given]
            self.batches[name, halves] = [self.collator.collate(piece) for piece in pieces]
        return self.batches[name, halves]


def log_gradient_conflicts(trainer: Any, callback: GradientConflictCallback) -> GradientConflictCallback:
    """
    Add the callback to a trainer, ahead of the callbacks that report to TensorBoard, Weights & Biases and the like, so
    that they report its values.

    Args:
        trainer (`Trainer`):
            Any trainer, before `train()`.
        callback ([`GradientConflictCallback`]):
            The callback.

    Returns:
        The callback.
    """
    if processes() > 1 and callback.output_file and not trainer.args.should_save:
        callback.output_file = ""
    trainer.add_callback(callback)
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, callbacks.pop())
    return callback
