"""Gradients computed on the side, without a trace in the training that goes on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .conflicts import cosines_of
from .feedback import mutable_buffers, restore_buffers
from .gradients import TaskGradients
from .losses import fork_state, restore_state


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Leave random streams, buffers, gradients and the training mode as they were."""
    streams = fork_state(device), np.random.get_state(), random.getstate()
    buffers = mutable_buffers(model)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters() if parameter.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        restore_buffers(buffers)
        for module, training in modes:
            module.training = training
        restore_state(streams[0], device)
        np.random.set_state(streams[1])
        random.setstate(streams[2])


def collect_rows(store: TaskGradients, losses: Iterable[tuple[int, Tensor]]) -> None:
    """
    One backward pass per loss, into the row of the given number. Losses of one forward pass come one after another;
    its graph is freed with the last reference to them.
    """
    for row, loss in losses:
        loss.backward(retain_graph=True)
        store.collect(row)


def cosines_of_halves(gramian: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Cosines between rows `2 t` and `2 t + 1`, `[tasks]`: the two halves of task t's batch."""
    cosines = cosines_of(gramian)
    return np.array([cosines[2 * task, 2 * task + 1] for task in range(len(cosines) // 2)])


def halves_of(size: int) -> tuple[Tensor, Tensor]:
    """Numbers of every other sample of a batch, and of the rest."""
    rows = torch.arange(size)
    return rows[::2], rows[1::2]
