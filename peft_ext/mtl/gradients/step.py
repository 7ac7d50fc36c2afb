"""One optimiser step: gradients are collected task by task, combined, and written back into `.grad`."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import nn

from ..aggregators import Step
from ..aggregators.joint import Joint
from ..data.collation import Source
from .probe import noise_floor
from .task_gradients import Combined, TaskGradients
from .task_passes import LabelPasses


logger = logging.getLogger(__name__)


class GradientStep:
    """The gradients of a trainer's optimiser steps."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    @property
    def gradients(self) -> TaskGradients:
        """Those collected so far."""
        gradients: TaskGradients = self.trainer.mtl_state.gradients
        return gradients

    def collect(self, model: nn.Module, inputs: Any) -> None:
        """Take the gradients of a micro-batch, task by task; or their sum, where it is all that is needed."""
        trainer, step = self.trainer, self.trainer.step_losses
        if trainer.mtl_state.gradients is None:
            trainer.mtl_state.attach(self._gradients_of(model))
        if trainer.aggregator.needs_feedback:
            trainer.feedback.keep(inputs, is_first=step.index == 0)
        if self._takes_sum():
            reduction = trainer.aggregator.reduction
            step.add(trainer.passes.backward_sum(model, inputs, step.window, step.index, reduction))
        else:
            step.add(trainer.passes.backward(model, inputs, step.window, step.index, self.gradients))

    def _gradients_of(self, model: nn.Module) -> TaskGradients:
        trainer, config = self.trainer, self.trainer.args
        dtype, by_layer = getattr(torch, config.jacobian_dtype), config.conflict_granularity == "layer"
        bare = trainer.accelerator.unwrap_model(model)
        return TaskGradients.of_model(bare, len(trainer.task_names), config.shared_parameters, dtype, by_layer)

    def _takes_sum(self) -> bool:
        """Whether one backward pass for all tasks does: nothing to combine, nothing to record."""
        trainer = self.trainer
        due = self._is_due(trainer.args.conflict_logging_steps) or self._is_due(trainer.args.noise_floor_steps)
        return isinstance(trainer.passes, LabelPasses) and type(trainer.aggregator) is Joint and not due

    def _is_due(self, every: int) -> bool:
        return every > 0 and (self.trainer.state.global_step + 1) % every == 0

    def combine(self, model: nn.Module, source: Source | None) -> Combined | None:
        """Combine the step's gradients and record what they were. A sum is in `.grad` already, and a step whose
        gradients are not finite is skipped: then there is nothing to write back."""
        trainer, step = self.trainer, self.trainer.step_losses
        expected = int(step.window.present.sum())
        losses = step.close(trainer.args.device)
        trainer.mtl_state.logged_losses.append(losses)
        present = step.window.present.numpy()
        if self._takes_sum():
            is_mean = trainer.aggregator.reduction == "mean" and present.any()
            self.gradients.average_sum(expected / int(present.sum()) if is_mean else 1.0)
            if trainer.accelerator.scaler is None and not self.gradients.sum_is_finite():  # a scaler sees by itself
                self._skip()
            return None
        self.gradients.reduce(1.0 / self._scale())
        gramian, layers = self.gradients.gramian()
        if not (
            np.isfinite(gramian).all() and np.isfinite(losses[present]).all() and self.gradients.heads_are_finite()
        ):
            self._skip()
            return None
        floor = noise_floor(trainer, model, source) if self._is_due(trainer.args.noise_floor_steps) else None
        combined = self.gradients.combine(trainer.aggregator, Step(gramian, present, losses))
        if self._is_due(trainer.args.conflict_logging_steps) or floor is not None:
            number, epoch = trainer.state.global_step + 1, trainer.state.epoch or 0.0
            trainer.conflicts.record(number, epoch, gramian, losses, combined.weights, layers, floor)
        return combined

    def write_back(self, combined: Combined) -> None:
        """Put the combined gradients into `.grad`, for the optimiser."""
        self.gradients.write(combined, self._scale())

    def _scale(self) -> float:
        scaler = self.trainer.accelerator.scaler
        return float(scaler.get_scale()) if scaler is not None else 1.0

    def _skip(self) -> None:
        """Leave parameters, optimiser and method as they are."""
        trainer = self.trainer
        self.gradients.clear()
        trainer.feedback.drop()
        trainer.mtl_state.skipped_steps += 1
        if trainer.accelerator.scaler is not None:
            self.gradients.put_infinity()  # the scaler then skips the step and lowers its scale
        else:
            logger.warning("Step %d has gradients that are not finite; it is skipped.", trainer.state.global_step + 1)
