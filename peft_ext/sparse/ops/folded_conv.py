"""The folded and dense paths of convolutions: the values sit inside the weight while a convolution runs.

Output and input gradient are the native convolutions' own. The gradient of the values is taken at the support only
(folded), or gathered from one transient dense gradient where entries are many (dense). As in `folded.py`, the original
bits are written back inside the op, so nobody else sees the folded weight.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ..support import Support, row_of_entry
from .conv import ConvGeometry, conv_grad_values


# Two threads that fold into one weight would each take the other's values for originals.
_FOLDING = threading.Lock()


def _places(weight: Tensor, indices: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weight's memory as a flat view, whatever its strides, and int64 positions of the entries in it."""
    column = indices.reshape(-1).long()
    place = row_of_entry(indices, offsets) * weight.stride(0)
    for size, stride in zip(reversed(weight.shape[1:]), reversed(weight.stride()[1:]), strict=True):
        place += column % size * stride
        column = column // size
    extent = 1 + sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    return weight.as_strided((extent,), (1,)), place


@contextmanager
def _folded_in(weight: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None) -> Iterator[Tensor]:
    target = weight.data  # no version bump: the content is the same outside this context
    with _FOLDING:
        memory, place = _places(target, indices, offsets)
        original = memory[place]
        try:
            memory[place] = (original + values.reshape(-1)).to(target.dtype)
            yield target
        finally:
            memory[place] = original


def _symmetric(padding: Sequence[int]) -> bool:
    return list(padding[::2]) == list(padding[1::2])


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], dilation: Sequence[int],
    padding: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    zeros = [0] * len(stride)
    if not _symmetric(padding):
        x, padding = F.pad(x, list(padding)), [0] * len(padding)
    sides = list(padding[::2])[::-1]
    return torch.ops.aten.convolution(x, weight, bias, list(stride), sides, list(dilation), False, zeros, groups)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], padding: Sequence[int],
    groups: int, which: int,
) -> Tensor:  # fmt: skip
    """Gradient of the input (`which` 0) or the weight (1). `padding` must be symmetric."""
    mask = [which == 0, which == 1, False]
    zeros = [0] * len(stride)
    sides = list(padding[::2])[::-1]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, list(stride), sides, list(dilation), False, zeros, groups, mask
    )[which]


@torch.library.custom_op("peft_ext::folded_conv", mutates_args=())
def _folded_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    tap_entries: Tensor,
    tap_ends: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    groups: int,
    dense_gradient: bool,
) -> Tensor:
    with _folded_in(weight, values, indices, offsets) as folded:
        return _convolve(x, folded, bias, stride, dilation, padding, groups)


@_folded_conv.register_fake
def _(  # type: ignore[no-untyped-def]
    x, weight, bias, values, indices, offsets, tap_entries, tap_ends, kernel, stride, dilation, padding, groups,
    dense_gradient,
):  # fmt: skip
    return _convolve(x, weight, bias, stride, dilation, padding, groups)


@torch.library.custom_op("peft_ext::folded_conv_grad_input", mutates_args=())
def _folded_conv_grad_input(
    grad: Tensor,
    shape: Sequence[int],
    weight: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    groups: int,
) -> Tensor:
    with _folded_in(weight, values, indices, offsets) as folded:
        return _grad_input(grad, shape, folded, stride, dilation, padding, groups)


def _grad_input(
    grad: Tensor, shape: Sequence[int], weight: Tensor, stride: Sequence[int], dilation: Sequence[int],
    padding: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    like = grad.new_empty(1).expand(tuple(shape))  # only its shape is read
    if _symmetric(padding):
        return _convolution_backward(grad, like, weight, stride, dilation, padding, groups, 0).contiguous()
    padded = F.pad(like, list(padding))
    none = [0] * len(padding)
    wide = _convolution_backward(grad, padded, weight, stride, dilation, none, groups, 0)
    return F.pad(wide, [-size for size in padding]).contiguous()


@_folded_conv_grad_input.register_fake
def _(grad, shape, weight, values, indices, offsets, stride, dilation, padding, groups):  # type: ignore[no-untyped-def]
    return grad.new_empty(tuple(shape))


@torch.library.custom_op("peft_ext::dense_conv_grad_values", mutates_args=())
def _dense_conv_grad_values(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    groups: int,
) -> Tensor:
    if not _symmetric(padding):
        x, padding = F.pad(x, list(padding)), [0] * len(padding)
    dense = _convolution_backward(grad, x, weight, stride, dilation, padding, groups, 1).flatten(1)
    return Support(indices, dense.shape[1], offsets).gather(dense)


@_dense_conv_grad_values.register_fake
def _(grad, x, weight, indices, offsets, stride, dilation, padding, groups):  # type: ignore[no-untyped-def]
    return grad.new_empty(indices.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, values, indices, offsets, tap_entries, tap_ends, *ctx.geometry, ctx.dense_gradient = inputs
    ctx.x_shape = x.shape
    saved_x = x if ctx.needs_input_grad[3] else None
    ctx.save_for_backward(saved_x, weight, values, indices, offsets, tap_entries, tap_ends)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    x, weight, values, indices, offsets, tap_entries, tap_ends = ctx.saved_tensors
    plain = ctx.geometry[1:]  # without the kernel's size, which the weight has
    grad_x = grad_bias = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_x = _folded_conv_grad_input(grad, ctx.x_shape, weight, values, indices, offsets, *plain)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum([0, *range(2, grad.dim())])
    if ctx.needs_input_grad[3]:
        if ctx.dense_gradient:
            grad_values = _dense_conv_grad_values(grad, x, weight, indices, offsets, *plain)
        else:
            grad_values = conv_grad_values(grad, x, indices, offsets, tap_entries, tap_ends, *ctx.geometry)
        grad_values = grad_values.to(values.dtype)
    return grad_x, None, grad_bias, grad_values, *(None,) * 10


_folded_conv.register_autograd(_backward, setup_context=_setup_context)


def folded_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    tap_entries: Tensor,
    tap_ends: Tensor,
    geometry: ConvGeometry,
    dense_gradient: bool = False,
) -> Tensor:
    """
    `(W + S(values)) * x + b` with W + S rounded to the weight's dtype; differentiable in `x`, `bias` and `values`.

    Args:
        x (`torch.Tensor`): `[samples, channels, *size]` or `[channels, *size]` in the weight's dtype; the only tensor
            saved for backward.
        weight (`torch.Tensor`): frozen, `[rows, channels / groups, *kernel]`, any strides; bit for bit the same
            afterwards.
        bias (`torch.Tensor`, *optional*): `[rows]`.
        values, indices, offsets: any support of the weight flattened to `[rows, fan_in]`, see [`Support`].
        tap_entries, tap_ends: from [`entries_by_tap`].
        geometry ([`ConvGeometry`]): the layer's.
        dense_gradient (`bool`, *optional*, defaults to `False`):
            Gather the gradient of the values from a dense one, which exists for a moment.
    """
    if x.dim() == len(geometry.kernel) + 1:
        return folded_conv(
            x[None], weight, bias, values, indices, offsets, tap_entries, tap_ends, geometry, dense_gradient
        ).squeeze(0)
    return _folded_conv(
        x, weight, bias, values, indices, offsets, tap_entries, tap_ends, *map(list, geometry.arguments()[:4]),
        geometry.groups, dense_gradient,
    )  # fmt: skip


def reference_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    geometry: ConvGeometry,
) -> Tensor:
    """The dense oracle: a convolution with `W + S(values)`, differentiable as torch has it."""
    from .reference import dense_delta

    delta = dense_delta(values, indices, weight[0].numel(), offsets).view(weight.shape)
    batched = x if x.dim() == weight.dim() else x[None]
    y = _convolve(
        batched, weight + delta.to(weight.dtype), bias, geometry.stride, geometry.dilation, geometry.padding,
        geometry.groups,
    )  # fmt: skip
    return y if x.dim() == weight.dim() else y.squeeze(0)
