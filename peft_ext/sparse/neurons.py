"""Base layers seen as neurons: which types are supported, and their weight as `[rows, fan_in]`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from .._peft_internals import QuantizationBackend


SUPPORTED = "torch.nn.Linear, transformers' Conv1D, and quantised linear layers that PEFT has a backend for"


def is_supported(base_layer: nn.Module, backend: QuantizationBackend | None) -> bool:
    """Whether a layer has neurons that we can adapt."""
    if backend is not None:
        return backend.layer_type == "linear"
    return isinstance(base_layer, (nn.Linear, Conv1D))


def neuron_view(base_layer: nn.Module, weight: Tensor) -> Tensor:
    """The weight (or a gradient of it) as `[rows, fan_in]`, a view: Conv1D keeps a neuron in a column."""
    return weight.t() if isinstance(base_layer, Conv1D) else weight


def is_plain(base_layer: nn.Module) -> bool:
    """Whether the layer computes `W x + b` and nothing else, so that calling it and multiplying by W are the same."""
    if type(base_layer) not in (nn.Linear, Conv1D) or "forward" in vars(base_layer):
        return False
    weight = base_layer.weight
    if type(weight) not in (nn.Parameter, Tensor) or isinstance(weight, DTensor) or weight.requires_grad:
        return False
    hooks = (
        base_layer._forward_hooks,
        base_layer._forward_pre_hooks,
        base_layer._backward_hooks,
        base_layer._backward_pre_hooks,
    )
    return not any(hooks) and not _has_any_global_hook()


def values_dtype_of(base_layer: Any) -> torch.dtype:
    """The dtype that PEFT gives to new adapter weights: the base's, or fp32 over packed weights."""
    dtype: torch.dtype = getattr(base_layer, "compute_dtype", None) or base_layer.weight.dtype
    return dtype if dtype.is_floating_point else torch.float32
