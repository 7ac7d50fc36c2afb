"""`Trainer` for several tasks: gradients task by task, combined once per optimiser step."""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from .aggregators import Aggregator, Step, make_aggregator
from .aggregators.base import Array
from .aggregators.joint import Joint
from .bookkeeping import TaskBookkeepingMixin
from .conflicts.recorder import ConflictRecorder
from .data.collation import SOURCE, Source
from .data.datasets import concatenate_tasks, task_ids_of
from .data.losses import Window
from .data.task_counts import TaskCountsMixin
from .data.task_data import TaskDataMixin, refuse_packing
from .evaluation import TaskEvaluationMixin
from .gradients.feedback import FeedbackCallback, Replay
from .gradients.task_gradients import TaskGradients
from .gradients.task_passes import TaskPassesMixin
from .parallel import (
    any_process,
    average_gradients,
    local,
    processes,
    refuse_unsupported,
    sum_over_processes,
)


logger = logging.getLogger(__name__)


class MTLTrainerMixin(TaskBookkeepingMixin, TaskEvaluationMixin, TaskDataMixin, TaskCountsMixin, TaskPassesMixin):
    """
    Multi-task training for any subclass of `Trainer`; put it first among the bases. See [`MTLTrainer`] for the
    arguments. To override: `compute_task_losses`.
    """

    def __init__(
        self,
        *args: Any,
        compute_task_losses_func: Callable[..., Mapping[str, Tensor]] | None = None,
        aggregator: Aggregator | None = None,
        **kwargs: Any,
    ) -> None:
        bound = inspect.signature(super().__init__).bind_partial(*args, **kwargs)
        given = bound.arguments
        config: Any = given.get("args")
        if not hasattr(config, "mtl_method"):
            raise ValueError(f"args must be an MTLConfig (or MTLSFTConfig), not {type(config).__name__}.")
        self.compute_task_losses_func = compute_task_losses_func
        self._splits = False  # whether batches are taken apart by task
        self._one_task_per_sample = False
        self._task_names = list(config.task_names) if config.task_names else None
        self._given_aggregator = aggregator
        self._aggregator: Aggregator | None = None
        self._recorder: ConflictRecorder | None = None
        self._gradients: TaskGradients | None = None
        self._loaded: dict[str, Any] | None = None  # of a checkpoint
        self._window: Window | None = None
        self._micro_batch = 0
        self._replay: Replay | None = None
        self._task_losses: Array | None = None  # of the window so far
        self._seen = torch.zeros(0, dtype=torch.bool)  # tasks with a loss in it
        self._returned = 0.0
        self._logged_losses: list[Array] = []
        self._skipped_steps = 0
        train_dataset = given.get("train_dataset")
        if compute_task_losses_func is None or config.task_column in (config.label_names or ()):
            refuse_packing(config, train_dataset, given.get("eval_dataset"))
        if isinstance(train_dataset, dict):
            self._take_names(list(train_dataset))
            given["train_dataset"] = concatenate_tasks(train_dataset, config.task_column)
        super().__init__(*bound.args, **bound.kwargs)
        refuse_unsupported(self)
        has_ids = config.task_column in (self.label_names or ())
        if isinstance(train_dataset, dict) and compute_task_losses_func is not None and not has_ids:
            raise ValueError(
                "compute_task_losses_func cannot tell the samples of a dict of data sets apart: add "
                f"{config.task_column!r} to label_names, so that its `labels` have every sample's task number, or "
                "leave the function out, and batches are taken apart by task."
            )
        reads_ids = compute_task_losses_func is None or has_ids
        if reads_ids and task_ids_of(self._train_data, config.task_column) is not None:
            self._splits = compute_task_losses_func is None
            self._one_task_per_sample = True
            self._prepare_split()
        if config.torch_compile or hasattr(self.model, "_orig_mod"):
            # A compiled graph otherwise gives its buffers away in the first task's backward pass.
            torch._functorch.config.donated_buffer = False
        if self._task_names is not None:
            self._make_aggregator()

    @property
    def aggregator(self) -> Aggregator:
        """The method that combines the gradients."""
        assert self._aggregator is not None
        return self._aggregator

    @property
    def conflicts(self) -> ConflictRecorder:
        """The gradient conflicts recorded so far."""
        assert self._recorder is not None
        return self._recorder

    def _make_aggregator(self) -> None:
        config, names = self.args, self.task_names
        options = {"reduction": config.gradient_reduction, "seed": config.seed, **(config.mtl_method_kwargs or {})}
        self._aggregator = self._given_aggregator or make_aggregator(config.mtl_method, len(names), **options)
        self._untrained = copy.deepcopy(self._aggregator.state_dict())
        path = os.path.join(config.output_dir, config.conflict_file) if config.conflict_file else None
        self._recorder = ConflictRecorder(names, path if config.should_save else None)
        if self._aggregator.needs_feedback:
            self.add_callback(FeedbackCallback(self))
        self._restore()

    def _make_gradients(self, model: nn.Module) -> TaskGradients:
        config = self.args
        parameters = {n: p for n, p in self.accelerator.unwrap_model(model).named_parameters() if p.requires_grad}
        heads = {name for name in parameters if ".modules_to_save." in name}
        dtype, by_layer = getattr(torch, config.jacobian_dtype), config.conflict_granularity == "layer"
        return TaskGradients(parameters, len(self.task_names), config.shared_parameters, heads, dtype, by_layer)

    # ------------------------------------------------------------------ one optimiser step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Backward passes of one micro-batch, task by task; with the window's last, their combination."""
        assert self._window is not None
        index = self._micro_batch
        self._micro_batch += 1
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        source = inputs.pop(SOURCE, None)
        if self._gradients is None:
            self._gradients = self._make_gradients(model)
            self._restore()
        if self.aggregator.needs_feedback:
            self._replay = self._replay if index else Replay(self.args.device)
            assert self._replay is not None
            self._replay.keep(inputs)
        is_plain = self._is_plain_step()
        with getattr(self, "maybe_activation_offload_context", None) or nullcontext():
            if self._splits:
                losses = self._backward_parts(model, inputs, index)
            elif is_plain:
                losses = self._backward_sum(model, inputs, index)
            else:
                losses = self._backward_tasks(model, inputs, index)
        self._seen[list(losses)] = True
        values = self._as_array(losses)
        self._task_losses = values if self._task_losses is None else self._task_losses + values
        if self.accelerator.sync_gradients:
            self._finish(model, source, combine=self._splits or not is_plain)
        divisor = int(self._window.present.sum()) if self.aggregator.reduction == "mean" else 1
        # So that the micro-batches' add up, even if the last shows that a task is absent.
        loss = float(self._task_losses.sum()) / max(1, divisor) - self._returned
        self._returned += loss
        return torch.tensor(loss, device=self.args.device, dtype=torch.float32)

    def _is_plain_step(self) -> bool:
        """Whether one backward pass of the sum does: nothing to combine, nothing to record."""
        due = self._is_due(self.args.conflict_logging_steps) or self._is_due(self.args.noise_floor_steps)
        return type(self.aggregator) is Joint and not due

    def _is_due(self, every: int) -> bool:
        return every > 0 and (self.state.global_step + 1) % every == 0

    def _finish(self, model: nn.Module, source: Source | None, combine: bool) -> None:
        """Combine the window's gradients into `.grad`, and record what they were."""
        assert self._window is not None and self._gradients is not None and self._task_losses is not None
        gradients, expected = self._gradients, int(self._window.present.sum())
        seen = any_process(self._seen.to(self.args.device)).cpu()
        # A task may have labels that cannot be counted, and turn out to have no loss.
        self._window = replace(self._window, totals=self._window.totals * seen)
        present = self._window.present.numpy()
        losses = np.where(present, self._mean_over_processes(self._task_losses), np.nan)
        self._logged_losses.append(losses)
        if not combine:
            average_gradients(gradients.parameters)
            if self.aggregator.reduction == "mean" and 0 < present.sum() < expected:
                for parameter in gradients.parameters:
                    if parameter.grad is not None:
                        parameter.grad *= expected / int(present.sum())
            self._skip_if_not_finite()
            return
        gradients.reduce()
        scaler = self.accelerator.scaler
        factor = float(scaler.get_scale()) if scaler is not None else 1.0
        if factor != 1.0:
            gradients.scale(1.0 / factor)
        gramian, layers = gradients.gramian()
        finite = np.isfinite(gramian).all() and np.isfinite(losses[present]).all() and gradients.heads_are_finite()
        if not finite:
            self._skip_step(with_scaler=scaler is not None)
            return
        floor = self._noise_floor(model, source) if self._is_due(self.args.noise_floor_steps) else None
        weights = gradients.write(self.aggregator, Step(gramian, present, losses), factor)
        gradients.clear()
        if self._is_due(self.args.conflict_logging_steps) or floor is not None:
            epoch = self.state.epoch or 0.0
            self.conflicts.record(self.state.global_step + 1, epoch, gramian, losses, weights, layers, floor)

    def _skip_step(self, with_scaler: bool) -> None:
        """Leave parameters, optimiser and method as they are."""
        assert self._gradients is not None
        self._gradients.clear()
        self._replay = None
        self._skipped_steps += 1
        if with_scaler:
            self._gradients.put_infinity()  # the scaler then skips the step and lowers its scale
        else:
            logger.warning("Step %d has gradients that are not finite; it is skipped.", self.state.global_step + 1)

    def _skip_if_not_finite(self) -> None:
        """The same for gradients that are in `.grad` already; a scaler sees to it by itself."""
        assert self._gradients is not None
        found = [p.grad for p in self._gradients.parameters if p.grad is not None]
        if self.accelerator.scaler is None and found:
            bad = ~torch.stack([local(gradient).isfinite().all() for gradient in found]).all()
            if bool(any_process(bad)):
                for parameter in self._gradients.parameters:
                    parameter.grad = None
                self._skip_step(with_scaler=False)

    def _mean_over_processes(self, losses: Array) -> Array:
        total = sum_over_processes(torch.tensor(losses, device=self.args.device, dtype=torch.float64))
        return (total / processes()).cpu().numpy()


class MTLTrainer(MTLTrainerMixin, Trainer):
    """
    `Trainer` for several tasks.

    The gradients of the shared trainable parameters (of a sparse adapter: its values) are collected task by task,
    accumulated over micro-batches, averaged over processes, and combined once per optimiser step, before clipping.
    Parameters of one task keep its own gradient. Works with gradient accumulation, fp16 and bf16, gradient
    checkpointing, DistributedDataParallel and FSDP2, and resumes bit for bit. A second `train()` keeps the method's
    state where it keeps the optimiser's: not with `model_init`, which makes all anew.

    Losses come from, in this order: `compute_task_losses_func`; one task per sample, if the training set is a dict of
    data sets or has the column `task_ids`; the model's output `task_losses`.

    Where every sample has one task, `data_collator` is called on the samples of each task. A collated batch is never
    cut, since its rows need not be samples: images, patches, videos and padding-free rows stay with their samples.
    Data loaders of your own collate with `trainer.task_collator()`.

    Args:
        model, args, train_dataset, ...: as for `Trainer`, with an [`MTLConfig`]. `train_dataset` may be a dict of one
            data set per task.
        compute_task_losses_func (`Callable`, *optional*):
            `f(outputs, labels, num_items_in_batch) -> dict` of a scalar loss per task. `labels` is the tensor of the
            one label name, or a dict where `label_names` has several. A task that a batch lacks is left out. Losses
            are means over labels that are neither -100 nor NaN: of the task's own labels, or of its column of labels
            `[samples, tasks]`. With `task_column` in `label_names`, `labels` has every sample's task number.
        aggregator ([`Aggregator`], *optional*):
            A method of your own, in place of `mtl_method`.

    Raises:
        `ValueError`: with DeepSpeed, `nn.DataParallel`, FSDP 1, optimisers that step during the backward pass, rows
            packed of several tasks' samples, or a batch that was collated with several tasks in it.

    Example:

    ```py
    trainer = MTLTrainer(
        model=model,
        args=MTLConfig(output_dir="out", mtl_method="pcgrad", label_names=["labels_seg", "labels_depth"]),
        train_dataset=dataset,
        compute_task_losses_func=lambda outputs, labels, num_items_in_batch=None: {
            "seg": F.cross_entropy(outputs["seg"], labels["labels_seg"]),
            "depth": F.l1_loss(outputs["depth"], labels["labels_depth"]),
        },
    )
    ```
    """
