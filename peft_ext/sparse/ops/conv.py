"""The bypass path of convolutions: `result + S(values) * x` at a cost that follows entries × output positions.

An entry of a convolution's weight multiplies one input channel, seen through a window that its kernel position (its
tap) shifts. So entries are grouped by tap; for each tap the windows of the channels that its entries read are
gathered, scaled and added to the output channels. No weight-sized and no unfolded tensor is made. Sums are taken in
fp32 (fp64 for fp64 tensors), a few samples and entries at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..support import row_of_entry


# Elements of a gathered piece, and of the fp32 sums of a few samples: bounds the transient memory.
CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class ConvGeometry:
    """
    What a convolution does apart from its weight.

    Args:
        kernel, stride, dilation (`tuple[int, ...]`): one number per spatial dimension.
        padding (`tuple[int, ...]`): zeros added on each side, as `torch.nn.functional.pad` takes them: last dimension
            first. `"same"` may add more on one side than on the other.
        groups (`int`): as in `torch.nn.Conv2d`.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int = 1

    @classmethod
    def of(cls, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> ConvGeometry:
        """Of a layer. Padding modes other than zeros are left to [`pad`]."""
        zeros = conv.padding_mode == "zeros"
        padding = tuple(conv._reversed_padding_repeated_twice) if zeros else (0,) * (2 * len(conv.kernel_size))
        return cls(conv.kernel_size, conv.stride, conv.dilation, padding, conv.groups)

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    def arguments(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        """As the ops take them."""
        return self.kernel, self.stride, self.dilation, self.padding, self.groups


def pad(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """What a layer with a padding mode other than zeros convolves without padding."""
    if conv.padding_mode == "zeros":
        return x
    return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)


def entries_by_tap(indices: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """
    Entry numbers int32 `[entries]` grouped by kernel position, and where each group ends: int32 `[taps + 1]` on the
    CPU, so that reading it does not wait for a device.
    """
    tap = indices.reshape(-1) % taps
    entries = torch.argsort(tap, stable=True).to(torch.int32)
    ends = torch.zeros(taps + 1, dtype=torch.int32)
    ends[1:] = torch.bincount(tap, minlength=taps).cumsum(0).cpu()
    return entries, ends


def _accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@dataclass(frozen=True)
class _Piece:
    """Some entries of one tap: entry numbers, output channels and input channels, int64; `window` cuts out what the
    tap sees of a padded input."""

    entries: Tensor
    rows: Tensor
    channels: Tensor
    window: tuple[slice, ...]


def _pieces(
    grad_or_result: Tensor,
    channels: int,
    indices: Tensor,
    offsets: Tensor | None,
    tap_entries: Tensor,
    tap_ends: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Iterator[_Piece]:
    rows, size = grad_or_result.shape[1], grad_or_result.shape[2:]
    entries = tap_entries.long()
    columns = indices.reshape(-1).long()[entries]
    row = row_of_entry(indices, offsets)[entries]
    taps = math.prod(kernel)
    channel = columns // taps + row // (rows // groups) * (channels // groups)
    step = max(1, CHUNK_ELEMENTS // max(1, grad_or_result.shape[0] * math.prod(size)))
    for tap, (start, end) in enumerate(pairwise(tap_ends.tolist())):
        place, window = tap, []
        for k, s, d, n in reversed(list(zip(kernel, stride, dilation, size, strict=True))):
            first = place % k * d
            window.append(slice(first, first + (n - 1) * s + 1, s))
            place //= k
        whole = (slice(None), slice(None), *reversed(window))
        for first in range(start, end, step):
            part = slice(first, min(first + step, end))
            yield _Piece(entries[part], row[part], channel[part], whole)


def _samples_at_once(result: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // max(1, math.prod(result.shape[1:])))


def _spread(weights: Tensor, dims: int) -> Tensor:
    return weights.view(-1, *(1,) * dims)


@torch.library.custom_op("peft_ext::conv_add", mutates_args=())
def conv_add(
    result: Tensor,
    x: Tensor,
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
) -> Tensor:
    """
    `result + S * x`, rounded once to the dtype of `result`.

    Args:
        result (`torch.Tensor`): `[samples, rows, *size]`, the base layer's output.
        x (`torch.Tensor`): `[samples, channels, *input size]`.
        values (`torch.Tensor`): `[rows, k]`, or `[entries]` with `offsets`.
        indices (`torch.Tensor`): int32 in the shape of `values`: columns of the weight flattened to `[rows, fan_in]`.
        offsets (`torch.Tensor`, *optional*): int32 `[rows + 1]` for a ragged support.
        tap_entries, tap_ends (`torch.Tensor`): from [`entries_by_tap`].
        kernel, stride, dilation, padding, groups: see [`ConvGeometry`].
    """
    dtype = _accumulation_dtype(result, x, values)
    out = result.clone(memory_format=torch.contiguous_format)
    weights = values.reshape(-1).to(dtype)
    samples = _samples_at_once(result)
    for x_part, part in zip(x.split(samples), out.split(samples), strict=True):
        padded = F.pad(x_part, list(padding)) if any(padding) else x_part
        total = part if part.dtype == dtype else torch.zeros(part.shape, dtype=dtype, device=x.device)
        for piece in _pieces(
            part, x.shape[1], indices, offsets, tap_entries, tap_ends, kernel, stride, dilation, groups
        ):
            seen = padded[piece.window].index_select(1, piece.channels).to(dtype)
            total.index_add_(1, piece.rows, seen.mul_(_spread(weights[piece.entries], len(kernel))))
        if total is not part:
            part.copy_(total.add_(part))
    return out


@conv_add.register_fake
def _(  # type: ignore[no-untyped-def]
    result, x, values, indices, offsets, tap_entries, tap_ends, kernel, stride, dilation, padding, groups
):
    return torch.empty_like(result, memory_format=torch.contiguous_format)


@torch.library.custom_op("peft_ext::conv_grad_values", mutates_args=())
def conv_grad_values(
    grad: Tensor,
    x: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    tap_entries: Tensor,
    tap_ends: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of the weight at the support only, fp32 (or fp64); see [`conv_add`]."""
    dtype = _accumulation_dtype(grad, x)
    total = torch.zeros(indices.numel(), dtype=dtype, device=x.device)
    others = [0, *range(2, grad.dim())]
    samples = _samples_at_once(grad)
    for grad_part, x_part in zip(grad.split(samples), x.split(samples), strict=True):
        padded = F.pad(x_part, list(padding)) if any(padding) else x_part
        for piece in _pieces(
            grad_part, x.shape[1], indices, offsets, tap_entries, tap_ends, kernel, stride, dilation, groups
        ):
            seen = padded[piece.window].index_select(1, piece.channels).to(dtype)
            total[piece.entries] += seen.mul_(grad_part.index_select(1, piece.rows)).sum(others)
    return total.view(indices.shape)


@conv_grad_values.register_fake
def _(  # type: ignore[no-untyped-def]
    grad, x, indices, offsets, tap_entries, tap_ends, kernel, stride, dilation, padding, groups
):
    return grad.new_empty(indices.shape, dtype=_accumulation_dtype(grad, x))


@torch.library.custom_op("peft_ext::conv_grad_input", mutates_args=())
def conv_grad_input(
    grad: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
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
) -> Tensor:
    """The gradient of an input of `shape` and `dtype`; see [`conv_add`]."""
    accumulate = _accumulation_dtype(grad, values)
    weights = values.reshape(-1).to(accumulate)
    out = torch.empty(tuple(shape), dtype=dtype, device=grad.device)
    samples = _samples_at_once(out)
    for part, grad_part in zip(out.split(samples), grad.split(samples), strict=True):
        total = F.pad(torch.zeros(part.shape, dtype=accumulate, device=grad.device), list(padding))
        for piece in _pieces(
            grad_part, shape[1], indices, offsets, tap_entries, tap_ends, kernel, stride, dilation, groups
        ):
            seen = grad_part.index_select(1, piece.rows).to(accumulate)
            total[piece.window].index_add_(1, piece.channels, seen.mul_(_spread(weights[piece.entries], len(kernel))))
        part.copy_(F.pad(total, [-size for size in padding]))
    return out


@conv_grad_input.register_fake
def _(  # type: ignore[no-untyped-def]
    grad, shape, dtype, values, indices, offsets, tap_entries, tap_ends, kernel, stride, dilation, padding, groups
):
    return grad.new_empty(tuple(shape), dtype=dtype)


@torch.library.custom_op("peft_ext::bypass_conv", mutates_args=())
def _bypass_conv(
    result: Tensor,
    x: Tensor,
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
) -> Tensor:
    return conv_add(
        result, x, values, indices, offsets, tap_entries, tap_ends, kernel, stride, dilation, padding, groups
    )


@_bypass_conv.register_fake
def _(  # type: ignore[no-untyped-def]
    result, x, values, indices, offsets, tap_entries, tap_ends, kernel, stride, dilation, padding, groups
):
    return torch.empty_like(result, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, x, values, indices, offsets, tap_entries, tap_ends, *ctx.geometry = inputs
    ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, values, indices, offsets, tap_entries, tap_ends)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    x, values, *support = ctx.saved_tensors
    grad_x = grad_values = None
    if ctx.needs_input_grad[1]:
        grad_x = conv_grad_input(grad, ctx.x_shape, ctx.x_dtype, values, *support, *ctx.geometry)
    if ctx.needs_input_grad[2]:
        grad_values = conv_grad_values(grad, x, *support, *ctx.geometry).to(values.dtype)
    return grad, grad_x, grad_values, *(None,) * 9


_bypass_conv.register_autograd(_backward, setup_context=_setup_context)


def bypass_conv(
    result: Tensor,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    tap_entries: Tensor,
    tap_ends: Tensor,
    geometry: ConvGeometry,
) -> Tensor:
    """
    Add the sparse update to a convolution's output; differentiable in `result`, `x` and `values`. See [`conv_add`];
    `result` and `x` may lack the dimension of samples. `x` is saved for backward as it is, in its dtype.
    """
    if result.dim() == len(geometry.kernel) + 1:
        return bypass_conv(result[None], x[None], values, indices, offsets, tap_entries, tap_ends, geometry).squeeze(0)
    return _bypass_conv(
        result, x, values, indices, offsets, tap_entries, tap_ends, *map(list, geometry.arguments()[:4]),
        geometry.groups,
    )  # fmt: skip
