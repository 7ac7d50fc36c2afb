"""The losses of the same batch after the optimiser's step, with the random numbers of the first forward pass."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from ..data.losses import fork_state, restore_state


class Replay:
    """The micro-batches of one optimiser step and the state of the random streams before each of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.batches: list[tuple[Any, Any]] = []

    def keep(self, inputs: Any) -> None:
        """Remember a micro-batch, just before its forward pass."""
        self.batches.append((dict(inputs), fork_state(self.device)))

    def run(self, trainer: Any, model: Any) -> Any:
        """Losses per task, float64 `[tasks]`, summed as in the training step; NaN for absent tasks."""
        here = fork_state(self.device)
        buffers = mutable_buffers(model)
        total = None
        try:
            with torch.no_grad():
                for index, (inputs, state) in enumerate(self.batches):
                    restore_state(state, self.device)
                    losses = trainer._replayed_losses(model, inputs, index)
                    total = losses if total is None else total + losses
        finally:
            restore_state(here, self.device)
            restore_buffers(buffers)
            self.batches = []
        return total


class FeedbackCallback(TrainerCallback):
    """Gives an aggregator that learns from the losses what it asks for, after each optimiser step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._give_feedback()


def mutable_buffers(model: torch.nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Buffers that a forward pass in training mode may change, such as batch normalisation's, with copies of them."""
    return [
        (buffer, buffer.clone())
        for buffer in model.buffers()
        if not buffer.is_meta and (buffer.is_floating_point() or not buffer.ndim)  # not tables of integers
    ]


@torch.no_grad()
def restore_buffers(buffers: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Put the copies back where something changed."""
    for buffer, copy in buffers:
        if not torch.equal(buffer, copy):
            buffer.copy_(copy)
