"""Triton kernels of the bypass. Triton is optional: where it is missing, the PyTorch path computes the same."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def triton_version() -> tuple[int, ...]:
    """Major and minor version of the installed Triton; zeros where there is none."""
    try:
        version: str = importlib.import_module("triton").__version__
    except ImportError:
        return (0, 0)
    return tuple(map(int, version.split(".")[:2]))


@functools.cache
def triton_supports(device: torch.device) -> bool:
    """Whether Triton is installed, has what we use (3.3 and later) and compiles for an NVIDIA GPU (A100 and later)."""
    if torch.version.hip is not None:  # AMD's GPUs call themselves cuda too
        return False
    return triton_version() >= (3, 3) and torch.cuda.get_device_capability(device)[0] >= 8


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these activations and values: on one supported GPU, in 16 or 32 bits."""
    device = tensors[0].device
    on_device = all(t.is_cuda and t.device == device and t.dtype in DTYPES for t in tensors)
    return on_device and triton_supports(device)


@functools.cache
def kernels() -> Any:
    """The module that launches the kernels, imported on first use since it needs Triton."""
    return importlib.import_module(".launch", __name__)
