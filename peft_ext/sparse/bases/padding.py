"""Convolutions that pad in a forward of their own, such as timm's `Conv2dSame`: what they pad, found by trial."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..ops import ConvGeometry
from ..ops.geometry import pad
from .sharded import shape_of


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUNCTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


@dataclass(frozen=True)
class OwnPadding:
    """The zeros that a convolution's own forward adds to its input."""

    geometry: ConvGeometry  # of the convolution that follows, which adds none
    # How many on each side, as `torch.nn.functional.pad` takes them. `None` stands for TensorFlow's "SAME": as many as
    # the output needs to be as large as the input divided by the stride
    zeros: tuple[int, ...] | None = None

    def zeros_at(self, size: Sequence[int]) -> tuple[int, ...]:
        """Zeros on each side of an input of a spatial size, last dimension first."""
        if self.zeros is not None:
            return self.zeros
        zeros: list[int] = []
        shape = self.geometry
        for n, k, stride, dilation in zip(size, shape.kernel, shape.stride, shape.dilation, strict=True):
            total = max((-(-n // stride) - 1) * stride + dilation * (k - 1) + 1 - n, 0)
            zeros = [total // 2, total - total // 2, *zeros]
        return tuple(zeros)

    @classmethod
    def of(cls, conv: nn.Module) -> OwnPadding | None:
        """
        What the class of a convolution adds, if all it does is to add zeros around the input and to convolve that
        with its weight and bias: tried out on so many sizes that every remainder of the stride occurs. `None` for
        any other forward.
        """
        if conv not in _known:
            _known[conv] = _find(conv)
        return _known[conv]


_known: weakref.WeakKeyDictionary[nn.Module, OwnPadding | None] = weakref.WeakKeyDictionary()


def has_own_forward(conv: nn.Module) -> bool:
    """Whether the class of a convolution computes it in its own way: it may pad there, or standardise the weight."""
    return _forward_of(type(conv)) not in map(_forward_of, CONVOLUTIONS)


def _forward_of(kind: Any) -> tuple[Any, Any]:
    return kind.forward, kind._conv_forward


def convolved(conv: Any, own: OwnPadding | None, x: Tensor) -> tuple[Tensor, ConvGeometry]:
    """Input that a layer convolves, padded by its own forward or its padding mode, and the geometry."""
    if own is None:
        return pad(conv, x), ConvGeometry.of(conv)
    return F.pad(x, own.zeros_at(x.shape[-len(own.geometry.kernel) :])), own.geometry


def _find(conv: Any) -> OwnPadding | None:
    extents = [dilation * (k - 1) + 1 for dilation, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    trials: list[tuple[tuple[int, ...], ConvGeometry, tuple[int, ...]]] = []
    for step in range(2 * max(conv.stride) + 2):
        size = tuple(extent + step + place for place, extent in enumerate(extents))
        for training in (True, False):
            trial = _try(conv, size, training)
            if trial is None:
                return None
            trials.append((size, *trial))
    _, geometry, zeros = trials[0]
    for own in (OwnPadding(geometry, zeros), OwnPadding(geometry)):
        if all((own.geometry, own.zeros_at(size)) == (geometry, zeros) for size, geometry, zeros in trials):
            return own
    return None


class _Convolutions(TorchFunctionMode):
    """Notes what torch's convolutions are called with, and what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[_Call, Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _FUNCTIONS:
            self.calls.append((_Call(*args, **(kwargs or {})), result))
        return result


@dataclass
class _Call:
    """Arguments of `torch.nn.functional.conv2d` and its like."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1


def _try(conv: Any, size: tuple[int, ...], training: bool) -> tuple[ConvGeometry, tuple[int, ...]] | None:
    """Geometry and added zeros of a convolution; `None` if the layer's forward does anything else."""
    parameters = [p for p in conv._parameters.values() if p is not None]
    zeros_for = {id(p): nn.Parameter(torch.zeros(shape_of(p)), requires_grad=False) for p in parameters}
    layer = copy.deepcopy(conv, zeros_for).train(training)  # with zeros in the place of its own parameters
    # Numbers that no rounding, clipping or activation function leaves as they are.
    x = 5 * torch.sin(torch.arange(1.0, conv.in_channels * torch.Size(size).numel() + 1))
    x = x.reshape(1, conv.in_channels, *size)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()), _Convolutions() as seen:
            result = type(conv).forward(layer, x)
    except Exception:  # it takes another input than convolutions do
        return None
    if len(seen.calls) != 1:
        return None
    call, output = seen.calls[0]
    if result is not output or call.weight is not layer.weight or call.bias is not layer.bias:
        return None
    if isinstance(call.padding, str):
        return None
    stride, around, dilation = (
        (n,) * len(size) if isinstance(n, int) else tuple(n) for n in (call.stride, call.padding, call.dilation)
    )
    zeros = _zeros_around(x, F.pad(call.input, [n for width in reversed(around) for n in (width, width)]))
    if zeros is None:
        return None
    kernel = tuple(call.weight.shape[2:])
    return ConvGeometry(kernel, stride, dilation, (0,) * 2 * len(size), call.groups), zeros


def _zeros_around(x: Tensor, padded: Tensor) -> tuple[int, ...] | None:
    """Number of zeros on each side of `x` in `padded`; `None` if anything else was done to it."""
    if padded.dim() != x.dim():
        return None
    inside = (padded != 0)[0, 0].nonzero()
    if inside.numel() == 0:
        return None
    first, last = inside.min(0).values.tolist(), inside.max(0).values.tolist()
    sides = list(zip(first, (n - 1 - end for n, end in zip(padded.shape[2:], last, strict=True)), strict=True))
    zeros = tuple(n for side in reversed(sides) for n in side)
    return zeros if torch.equal(F.pad(x, zeros), padded) else None
