"""The folded and dense paths of convolutions: the values sit inside the weight while a convolution runs.

Output and input gradient are the native convolutions' own. The gradient of the values is taken at the support only
(folded), or gathered from one transient dense gradient where entries are many (dense). As in `folded.py`, the original
bits are written back inside the op, so nobody else sees the folded weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..support import Support
from .conv import conv_grad_input, conv_grad_values, entries_by_tap
from .derivatives import register_derivative
from .folding import copy_of, flat_places, folded_in
from .geometry import ConvGeometry
from .reference import dense_delta


def _evenly_padded(x: Tensor, geometry: ConvGeometry) -> tuple[Tensor, ConvGeometry]:
    """An input and a geometry that pads both sides alike, which is all that torch's convolution takes."""
    if geometry.padding[::2] == geometry.padding[1::2]:
        return x, geometry
    return F.pad(x, geometry.padding), replace(geometry, padding=(0,) * len(geometry.padding))


def _plain_arguments(geometry: ConvGeometry) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
    """Stride, padding, dilation, transposed, output padding and groups."""
    padding = list(geometry.padding[::2])[::-1]
    return list(geometry.stride), padding, list(geometry.dilation), False, [0] * len(padding), geometry.groups


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    x, even = _evenly_padded(x, geometry)
    return torch.ops.aten.convolution(x, weight, bias, *_plain_arguments(even))


def _convolve_one_or_more(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """Of samples, or of one without a dimension for them."""
    if x.dim() == weight.dim():
        return _convolve(x, weight, bias, geometry)
    return _convolve(x[None], weight, bias, geometry).squeeze(0)


@torch.library.custom_op("peft_ext::folded_conv", mutates_args=())
def _folded_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor, offsets: Tensor | None,
    tap_entries: Tensor, tap_ends: Tensor, geometry: Sequence[int], dense_gradient: bool,
) -> Tensor:  # fmt: skip
    with folded_in(weight, values, indices, offsets) as folded:
        result = _convolve(x, folded, bias, ConvGeometry.unpack(geometry))
    # In one dimension torch gives a view, which autograd would not let a model change in place.
    if result._is_view():
        result = result.new_empty(0).set_(
            result.untyped_storage(), result.storage_offset(), result.shape, result.stride()
        )
    return result


@_folded_conv.register_fake
def _(  # type: ignore[no-untyped-def]
    x, weight, bias, values, indices, offsets, tap_entries, tap_ends, geometry, dense_gradient
):
    return _convolve(x, weight, bias, ConvGeometry.unpack(geometry))


@torch.library.custom_op("peft_ext::folded_conv_grad_input", mutates_args=())
def _folded_conv_grad_input(
    grad: Tensor, size: Sequence[int], weight: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None,
    geometry: Sequence[int],
) -> Tensor:  # fmt: skip
    shape = ConvGeometry.unpack(geometry)
    like = grad.new_empty(1).expand(tuple(size))  # only its shape is read
    like, even = _evenly_padded(like, shape)
    with folded_in(weight, values, indices, offsets) as folded:
        wide = torch.ops.aten.convolution_backward(
            grad, like, folded, None, *_plain_arguments(even), [True, False, False]
        )[0]
    return (wide if even is shape else F.pad(wide, [-width for width in shape.padding])).contiguous()


@_folded_conv_grad_input.register_fake
def _(grad, size, weight, values, indices, offsets, geometry):  # type: ignore[no-untyped-def]
    return grad.new_empty(tuple(size))


@torch.library.custom_op("peft_ext::dense_conv_grad_values", mutates_args=())
def _dense_conv_grad_values(
    grad: Tensor, x: Tensor, weight: Tensor, indices: Tensor, offsets: Tensor | None, geometry: Sequence[int]
) -> Tensor:
    x, even = _evenly_padded(x, ConvGeometry.unpack(geometry))
    whole = torch.ops.aten.convolution_backward(grad, x, weight, None, *_plain_arguments(even), [False, True, False])[
        1
    ].flatten(1)
    return Support(indices, whole.shape[1], offsets).gather(whole)


@_dense_conv_grad_values.register_fake
def _(grad, x, weight, indices, offsets, geometry):  # type: ignore[no-untyped-def]
    return grad.new_empty(indices.shape)


def _setup_context(ctx, needed, inputs) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, *support, ctx.geometry, ctx.dense_gradient = inputs
    ctx.x_size = x.shape
    ctx.save_for_backward(x if needed[3] else None, weight, *support)


def _backward(ctx, needed, grad: Tensor):  # type: ignore[no-untyped-def]
    x, weight, values, indices, offsets, tap_entries, tap_ends = ctx.saved_tensors
    grad_x = grad_bias = grad_values = None
    if needed[0]:
        grad_x = _folded_conv_grad_input(grad, ctx.x_size, weight, values, indices, offsets, ctx.geometry)
    if needed[2]:
        grad_bias = grad.sum([0, *range(2, grad.dim())])
    if needed[3] and ctx.dense_gradient:
        grad_values = _dense_conv_grad_values(grad, x, weight, indices, offsets, ctx.geometry).to(values.dtype)
    elif needed[3]:
        grad_values = conv_grad_values(grad, x, indices, offsets, tap_entries, tap_ends, ctx.geometry).to(values.dtype)
    return grad_x, None, grad_bias, grad_values, *(None,) * 6


def _setup_grad_input(ctx, needed, inputs) -> None:  # type: ignore[no-untyped-def]
    outer, _, *tensors, ctx.geometry = inputs
    ctx.save_for_backward(outer, *tensors)


def _backward_grad_input(ctx, needed, grad: Tensor):  # type: ignore[no-untyped-def]
    outer, weight, values, *support = ctx.saved_tensors
    support += entries_by_tap(support[0], ConvGeometry.unpack(ctx.geometry).taps)
    grad_outer = grad_values = None
    if needed[0]:
        grad_outer = _folded_conv(grad, weight, None, values, *support, ctx.geometry, False)
    if needed[3]:
        grad_values = conv_grad_values(outer, grad, *support, ctx.geometry).to(values.dtype)
    return grad_outer, None, None, grad_values, None, None, None


def _setup_dense_grad_values(ctx, needed, inputs) -> None:  # type: ignore[no-untyped-def]
    outer, x, weight, *support, ctx.geometry = inputs
    ctx.weight_shape = weight.shape
    ctx.save_for_backward(outer, x, *support)


def _backward_dense_grad_values(ctx, needed, grad: Tensor):  # type: ignore[no-untyped-def]
    outer, x, *support = ctx.saved_tensors
    grad_outer = grad_x = None
    geometry = ConvGeometry.unpack(ctx.geometry)
    if needed[0]:
        update = dense_delta(grad, support[0], ctx.weight_shape[1:].numel(), support[1]).view(ctx.weight_shape)
        grad_outer = _convolve(x, update.to(x.dtype), None, geometry)
    if needed[1]:
        taps = entries_by_tap(support[0], geometry.taps)
        grad_x = conv_grad_input(outer, x.shape, x.dtype, grad, *support, *taps, ctx.geometry)
    return grad_outer, grad_x, *(None,) * 4


register_derivative(_folded_conv, _setup_context, _backward)
register_derivative(_folded_conv_grad_input, _setup_grad_input, _backward_grad_input)
register_derivative(_dense_conv_grad_values, _setup_dense_grad_values, _backward_dense_grad_values)


def folded_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor, offsets: Tensor | None,
    tap_entries: Tensor, tap_ends: Tensor, geometry: ConvGeometry, dense_gradient: bool = False,
) -> Tensor:  # fmt: skip
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
    rest = (weight, bias, values, indices, offsets, tap_entries, tap_ends, geometry.pack(), dense_gradient)
    return _folded_conv(x, *rest) if x.dim() == weight.dim() else _folded_conv(x[None], *rest).squeeze(0)


def copied_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor, offsets: Tensor | None,
    geometry: ConvGeometry,
) -> Tensor:  # fmt: skip
    """[`folded_conv`] in a copy of the weight, so that threads may share it; without gradients."""
    whole = copy_of(weight)
    memory, place = flat_places(whole, indices, offsets)
    memory[place] = (memory[place] + values.detach().reshape(-1)).to(whole.dtype)
    return _convolve_one_or_more(x, whole, bias, geometry)


def reference_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor, offsets: Tensor | None,
    geometry: ConvGeometry,
) -> Tensor:  # fmt: skip
    """The dense oracle: a convolution with `W + S(values)`, differentiable as torch has it."""
    delta = dense_delta(values, indices, weight[0].numel(), offsets).view(weight.shape)
    return _convolve_one_or_more(x, weight + delta.to(weight.dtype), bias, geometry)
