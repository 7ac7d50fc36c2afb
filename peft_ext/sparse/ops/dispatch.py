"""Choice of the path that computes a layer: by the type of the base layer, then by measured crossovers."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..memory import why_not_ours
from .crossovers import fastest_path
from .derivatives import is_transformed
from .standard import is_exporting_to_onnx


Backend = Literal["auto", "bypass", "folded", "dense", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)


def _settled_path(requested: str, x: Tensor, weight: Tensor | None, entries: int) -> str | None:
    """The path where the frozen weight may not be read, or gains nothing; `None` where it may, and speed decides."""
    if weight is not None and is_exporting_to_onnx():
        return "reference"  # of standard operators, which ONNX knows
    if requested == "bypass" or entries == 0 or weight is None:
        return "bypass"
    return "bypass" if x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type) else None


def choose_backend(
    requested: str, x: Tensor, weight: Tensor | None, entries: int, rows: int, is_even: bool = True
) -> str:
    """
    The path to take for one call.

    Args:
        requested (`str`):
            The adapter's `backend`. Folded and dense read W, so they give way to the bypass where that can't be done.
            `"auto"` does not fold into memory that is not this process's own; see [`why_not_ours`].
        x (`torch.Tensor`):
            `[..., fan_in]`.
        weight (`torch.Tensor`, *optional*):
            The frozen weight, or `None` if the base layer does more than `W x + b` (hooks, a subclass, a quantised or
            sharded weight).
        entries, rows (`int`):
            Size of the support.
        is_even (`bool`):
            Whether each row has equally many entries.
    """
    path = _settled_path(requested, x, weight, entries)
    if path is not None or weight is None:
        return path or "bypass"
    if is_transformed():
        return "reference" if requested == "reference" else "bypass"  # the one with rules for torch.func
    if requested != "auto":
        return requested
    # Without gradients the bypass leaves W alone, so that threads may serve from one model. Composing in 16 bits
    # would round the values to the spacing of W, and a compiler sees through the bypass best.
    wide = weight.dtype in (torch.float32, torch.float64)
    if not wide or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return "bypass"
    tokens = x.numel() // x.shape[-1]
    path = fastest_path(x.device.type, is_even, entries, rows, x.shape[-1], tokens)
    return path if path != "folded" or why_not_ours(weight) is None else "bypass"


# The same for convolutions: share of trained entries above which one dense weight gradient beats windows entry by
# entry. One thread, fp32: 0.02 for ungrouped kernels of 1x1 and 3x3; 0.6 for depthwise 7x7, whose dense one is slow.
DENSE_CONV_ABOVE = 0.02
DENSE_GROUPED_CONV_ABOVE = 0.5
# Without gradients W + S is composed in a copy up to this many weights. CPU, two threads, fp32, k=1 and 8, 1 and 8
# samples, 13 layers from 3x3 of 16 channels to 1x1 of 2048 and 512: 0.04 to 0.97 times the bypass.
COPIED_CONV_UP_TO = 2**20


def choose_conv_backend(requested: str, x: Tensor, weight: Tensor | None, entries: int, groups: int = 1) -> str:
    """
    The path to take for one call of a convolution; see [`choose_backend`]. The folded path takes any support, and
    `"copied"` is one more that only `"auto"` takes: without gradients, where a copy of W is soon made.
    """
    if is_transformed():
        requested = "reference"  # the one with rules for torch.func
    path = _settled_path(requested, x, weight, entries)
    if path is not None or weight is None:
        return path or "bypass"
    if requested != "auto":
        return requested
    wide = weight.dtype in (torch.float32, torch.float64)
    if not wide or torch.compiler.is_compiling():
        return "bypass"
    if not torch.is_grad_enabled():
        is_small = weight.device.type == "cpu" and weight.numel() <= COPIED_CONV_UP_TO
        return "copied" if is_small else "bypass"
    if why_not_ours(weight) is not None:  # the dense path of convolutions folds too
        return "bypass"
    share = min(DENSE_CONV_ABOVE * groups, DENSE_GROUPED_CONV_ABOVE)
    return "dense" if entries > share * weight.numel() else "folded"
