"""State of a model before an adapter is loaded or converted, to return to if that fails."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..hf.internals import BaseTunerLayer


class Snapshot:
    """
    Modules of a model with their attributes, hooks, modes and adapters; trainable parameters, and biases.

    Weights are not copied, but those in `written`: loading an adapter writes into none of the base's but biases.
    """

    def __init__(self, model: nn.Module, written: Iterable[Tensor] = ()) -> None:
        attributes = [vars(module) for module in model.modules()]
        inside = [value for own in attributes for value in own.values() if isinstance(value, (dict, list, set))]
        self.containers: list[tuple[Any, Any]] = [(now, copy.copy(now)) for now in (*attributes, *inside)]
        self.parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        biases = (parameter for name, parameter in model.named_parameters() if name.endswith("bias"))
        self.tensors = [(tensor, tensor.detach().clone()) for tensor in (*biases, *written)]
        layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
        self.merged = [(layer, list(layer.merged_adapters)) for layer in layers]

    def restore(self) -> None:
        """Return to it."""
        for layer, names in self.merged:
            if names and not layer.merged_adapters:  # PEFT unmerges to activate what it has loaded
                layer.merge(adapter_names=names)
        # Into the same objects: a hook's handle, for one, knows its table and not its module.
        for now, before in self.containers:
            now.clear()
            (now.extend if isinstance(now, list) else now.update)(before)
        for parameter, trainable in self.parameters:
            parameter.requires_grad_(trainable)
        for tensor, values in self.tensors:
            # Not without need, for others may read its memory. (Of 8-bit floats torch compares no two.)
            if not tensor.is_meta and not torch.equal(tensor.double(), values.double()):
                tensor.data.copy_(values)


@contextmanager
def unchanged_on_error(model: nn.Module, written: Iterable[Tensor] = ()) -> Iterator[None]:
    """
    Around work that replaces modules and sets attributes of a model, and writes into some tensors: on an error, put
    all of them back.
    """
    before = Snapshot(model, written)
    try:
        yield
    except BaseException:
        before.restore()
        raise
