"""A pass for scores or measurements leaves no trace on the model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def preserved(model: nn.Module, training: bool) -> Iterator[None]:
    """
    Put the model into training or evaluation mode; on exit, also by an exception, every module's mode, every
    parameter's `requires_grad` and `grad`, every buffer that training mode may change, and the states of the random
    generators of Python, numpy and torch are as they were.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    # Batch statistics move in training mode only, and tables of integers not at all.
    moving = (b for b in model.buffers() if not b.is_meta and (b.is_floating_point() or not b.ndim))
    buffers = [(buffer, buffer.clone()) for buffer in moving] if training else []
    python, numpy = random.getstate(), np.random.get_state()
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(device.index or 0 for device in devices)):
        try:
            for parameter, _, _ in parameters:
                parameter.grad = None
            model.train(training)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for module, mode in modes:
                module.training = mode
            for parameter, required, gradient in parameters:
                parameter.requires_grad_(required)
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):  # not into memory that others may read
                        buffer.copy_(before)
