"""The bypass path of convolutions: `result + S(values) * x` at a cost that follows entries × output positions.

An entry of a convolution's weight multiplies one input channel, seen through a window that its kernel position (its
tap) shifts. These windows are gathered, a piece of some entries at a time: tap by tap, where a window is a slice of
the input, or, with few entries per tap, by one indexing of a view that has all windows (fp32, k=1, 8 samples, one CPU
thread: 16 and 3 ms for the value gradient of a depthwise 7x7 convolution of 96 channels, 28x28; patches of 16x16: 13
and 1 ms; a dense 3x3 convolution with k=4 the other way round: 5 and 11 ms). No weight-sized and no unfolded tensor is
made. Sums are taken in fp32 (fp64 for fp64 tensors).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..support import offsets_from_counts, row_of_entry
from .bags import accumulation_dtype
from .geometry import ConvGeometry


# Elements of a gathered piece, and of the fp32 sums of a few samples: bounds the transient memory. A GPU wants few
# large kernels.
CHUNK_ELEMENTS = 2**20
CHUNK_ELEMENTS_CUDA = 2**24
# Mean number of entries per tap from which going tap by tap is faster on a CPU.
ENTRIES_PER_TAP = 32


def entries_by_tap(indices: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """
    Entry numbers int32 `[entries]` grouped by kernel position, and where each group ends: int32 `[taps + 1]` on the
    CPU, so that reading it does not wait for a device.
    """
    tap = indices.reshape(-1) % taps
    entries = torch.argsort(tap, stable=True).to(torch.int32)
    return entries, offsets_from_counts(torch.bincount(tap, minlength=taps)).cpu()


@dataclass(frozen=True)
class Entries:
    """The entries of a support in the order of their taps: entry numbers, output and input channels, int64."""

    number: Tensor
    rows: Tensor
    channels: Tensor
    taps: Tensor
    ends: list[int]
    geometry: ConvGeometry

    @classmethod
    def of(
        cls, indices: Tensor, offsets: Tensor | None, tap_entries: Tensor | None, tap_ends: Tensor | None,
        packed: Sequence[int], rows: int, channels: int,
    ) -> Entries:  # fmt: skip
        geometry = ConvGeometry.unpack(packed)
        if tap_entries is None or tap_ends is None:
            tap_entries, tap_ends = entries_by_tap(indices, geometry.taps)
        number = tap_entries.long()
        columns = indices.reshape(-1).long()[number]
        row = row_of_entry(indices, offsets)[number]
        group = row // (rows // geometry.groups)
        channel = columns // geometry.taps + group * (channels // geometry.groups)
        return cls(number, row, channel, columns % geometry.taps, tap_ends.tolist(), geometry)

    def weights(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The values in this order, to multiply what entries see."""
        return values.reshape(-1).to(dtype)[self.number].view(-1, *(1,) * len(self.geometry.kernel))

    def by_tap(self, padded: Tensor, output: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Slices of entries of one tap, and the view of a padded input that the tap sees, for an output
        `[samples, rows, *size]`."""
        windows = self.geometry.windows(padded, output.shape[2:])
        for place, (start, end) in zip(product(*map(range, self.geometry.kernel)), pairwise(self.ends), strict=True):
            seen: Any = (slice(None), slice(None), *place)
            for part in _slices(start, end, output):
                yield part, windows[seen]

    def seen(self, padded: Tensor, output: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Slices of entries, and what they see of a padded input: `[samples, entries, *size]`, a copy."""
        if padded.is_cuda or len(self.number) < ENTRIES_PER_TAP * self.geometry.taps:
            windows = self.geometry.windows(padded, output.shape[2:])
            places = torch.unravel_index(self.taps, self.geometry.kernel)
            for part in _slices(0, len(self.number), output):
                chosen: Any = (slice(None), self.channels[part], *(place[part] for place in places))
                yield part, windows[chosen]
        else:
            for part, window in self.by_tap(padded, output):
                yield part, window.index_select(1, self.channels[part])


def _chunk(tensor: Tensor, elements_each: int) -> int:
    return max(1, (CHUNK_ELEMENTS_CUDA if tensor.is_cuda else CHUNK_ELEMENTS) // max(1, elements_each))


def _slices(start: int, end: int, output: Tensor) -> Iterator[slice]:
    step = _chunk(output, output.shape[0] * math.prod(output.shape[2:]))
    return (slice(first, min(first + step, end)) for first in range(start, end, step))


def _samples_at_once(tensor: Tensor) -> int:
    return _chunk(tensor, math.prod(tensor.shape[1:]))


def _padded(x: Tensor, geometry: ConvGeometry) -> Tensor:
    return F.pad(x, geometry.padding) if any(geometry.padding) else x


def add_of_convolution(result: Tensor, x: Tensor, values: Tensor, support: Entries) -> Tensor:
    """`result + S x`, rounded once to the dtype of `result`; see [`bypass`]."""
    dtype = accumulation_dtype(result, x, values)
    out = result.clone(memory_format=torch.contiguous_format)
    weights = support.weights(values, dtype)
    samples = _samples_at_once(result)
    for x_part, part in zip(x.split(samples), out.split(samples), strict=True):
        padded = _padded(x_part, support.geometry)
        total = part if part.dtype == dtype else torch.zeros(part.shape, dtype=dtype, device=x.device)
        for some, seen in support.seen(padded, part):
            total.index_add_(1, support.rows[some], seen.to(dtype).mul_(weights[some]))
        if total is not part:
            part.copy_(total.add_(part))
    return out


def values_gradient_of_convolution(grad: Tensor, x: Tensor, support: Entries) -> Tensor:
    """The gradient of the weight at the support only, `[entries]`, fp32 (or fp64)."""
    dtype = accumulation_dtype(grad, x)
    total = torch.zeros(len(support.number), dtype=dtype, device=x.device)
    others = [0, *range(2, grad.dim())]
    samples = _samples_at_once(grad)
    for grad_part, x_part in zip(grad.split(samples), x.split(samples), strict=True):
        padded = _padded(x_part, support.geometry)
        for some, seen in support.seen(padded, grad_part):
            products = seen.to(dtype).mul_(grad_part.index_select(1, support.rows[some]))
            total[support.number[some]] += products.sum(others)
    return total


def input_gradient_of_convolution(out: Tensor, grad: Tensor, values: Tensor, support: Entries) -> Tensor:
    """The gradient of the input, written to `out`."""
    accumulate = accumulation_dtype(grad, values)
    weights = support.weights(values, accumulate)
    samples = _samples_at_once(out)
    for part, grad_part in zip(out.split(samples), grad.split(samples), strict=True):
        total = _padded(torch.zeros(part.shape, dtype=accumulate, device=grad.device), support.geometry)
        for some, window in support.by_tap(total, grad_part):
            back = grad_part.index_select(1, support.rows[some]).to(accumulate).mul_(weights[some])
            window.index_add_(1, support.channels[some], back)
        part.copy_(F.pad(total, [-width for width in support.geometry.padding]))
    return out
