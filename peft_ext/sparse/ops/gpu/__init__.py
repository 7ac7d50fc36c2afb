"""Triton kernels of the bypass. Triton is optional: where it is missing, the PyTorch path computes the same."""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import sysconfig
import warnings
from pathlib import Path
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


def launcher_lacks() -> str | None:
    """Missing requirements of Triton's launcher build, searched for where its `runtime/build.py` searches."""
    knobs = getattr(importlib.import_module("triton"), "knobs", None)
    if knobs is not None and knobs.build.impl is not None:  # the user's own way to build
        return None
    chosen = os.environ.get("CC")
    if chosen is not None and shutil.which(chosen) is None:
        return f"the C compiler that the environment variable CC names, {chosen!r}: set it to one that exists"
    if chosen is None and not (shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler: install gcc or clang, or set the environment variable CC to one"
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    if not Path(include, "Python.h").exists():
        return f"Python's headers in {include}: install them (python3-dev on Debian and Ubuntu)"
    return None


@functools.cache
def can_launch() -> bool:
    """Whether Triton can launch what it compiles; where not, a warning says why, once."""
    lacking = launcher_lacks()
    if lacking is not None:
        warnings.warn(
            f"sparse updates run on PyTorch's slower operators, since Triton cannot launch kernels without {lacking}",
            stacklevel=2,
        )
    return lacking is None


@functools.cache
def triton_supports(device: torch.device) -> bool:
    """
    Whether Triton is installed, has what we use (3.3 and later), compiles for an NVIDIA GPU (A100 and later) and can
    launch what it compiled.
    """
    if torch.version.hip is not None:  # AMD's GPUs call themselves cuda too
        return False
    return triton_version() >= (3, 3) and torch.cuda.get_device_capability(device)[0] >= 8 and can_launch()


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these activations and values: on one supported GPU, in 16 or 32 bits."""
    device = tensors[0].device
    on_device = all(t.is_cuda and t.device == device and t.dtype in DTYPES for t in tensors)
    return on_device and triton_supports(device)


@functools.cache
def kernels() -> Any:
    """The module that launches the kernels, imported on first use since it needs Triton."""
    return importlib.import_module(".launch", __name__)
