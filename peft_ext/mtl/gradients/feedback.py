"""The losses of the same batch after the optimiser's step, with the random numbers of the first forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import TrainerCallback

from ...preserve import preserved
from ..aggregators.base import Array
from ..data.losses import StepLosses
from .probe import unlogged


class Feedback(TrainerCallback):
    """Gives a trainer's aggregator that learns from the losses the new ones, after each optimiser step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.batches: list[tuple[Any, ...]] = []  # micro-batches, and the random streams before each of them

    def keep(self, inputs: Any, is_first: bool) -> None:
        """Remember a micro-batch, just before its forward pass; the step's first one replaces the last step's."""
        self.batches = [] if is_first else self.batches
        device = self.trainer.args.device  # of others than CUDA, torch can't tell the random streams
        of_device = get_device_states(torch.empty(0, device=device if device.type == "cuda" else "cpu"))
        self.batches.append((dict(inputs), torch.get_rng_state(), of_device))

    def drop(self) -> None:
        """Forget the micro-batches of a step that is skipped."""
        self.batches = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if self.batches and not trainer.accelerator.optimizer_step_was_skipped:
            with unlogged(trainer), preserved(trainer.model_wrapped, training=True), torch.no_grad():
                losses = self._replayed(trainer.step_losses)
            trainer.aggregator.feedback(trainer.step_losses.averaged(losses, args.device))
        self.drop()

    def _replayed(self, step: StepLosses) -> Array:
        """Losses per task, float64 `[tasks]`, summed as in the training step."""
        trainer, total = self.trainer, np.zeros(len(step.sums))
        for index, (inputs, of_cpu, of_device) in enumerate(self.batches):
            torch.set_rng_state(of_cpu)
            set_device_states(*of_device, device_type=trainer.args.device.type)
            losses = trainer.passes.replay(trainer.model_wrapped, inputs, step.window, index)
            total = total + step.as_array(losses)
        return total
