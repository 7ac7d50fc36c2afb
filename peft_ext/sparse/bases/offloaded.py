"""Base weights that accelerate keeps on the CPU or on disk, and brings to a device for each call of their layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn

from .part import Part


def is_offloaded(base_layer: nn.Module) -> bool:
    """Whether accelerate has taken a layer's weights away; a part comes and goes with its owner."""
    if isinstance(base_layer, nn.MultiheadAttention):
        return has_offloaded_params(base_layer) or has_offloaded_params(base_layer.out_proj)
    return is_offloaded(base_layer.owner) if isinstance(base_layer, Part) else has_offloaded_params(base_layer)


def execution_device(base_layer: Any) -> torch.device:
    """Device on which an offloaded layer computes."""
    device = base_layer._hf_hook.execution_device
    return torch.device("cpu" if device is None else device)


@contextmanager
def onloaded(base_layer: Any) -> Iterator[None]:
    """Has an offloaded layer's weights in place; other layers are left alone."""
    weight = getattr(base_layer, "weight", None)
    if not has_offloaded_params(base_layer) or not (isinstance(weight, torch.Tensor) and weight.is_meta):
        yield
        return
    with align_module_device(base_layer):
        yield
