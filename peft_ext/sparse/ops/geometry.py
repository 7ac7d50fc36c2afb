"""Geometry of a convolution: stride, padding, dilation and groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ConvGeometry:
    """Kernel, stride, dilation, padding and groups of a convolution."""

    # One number per spatial dimension
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    # Zeros added on each side, as `torch.nn.functional.pad` takes them: last dimension first. `"same"` may add more on
    # one side than on the other
    padding: tuple[int, ...]
    groups: int = 1  # as in `torch.nn.Conv2d`

    @classmethod
    def of(cls, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> ConvGeometry:
        """Geometry of a layer. Padding modes other than zeros are left to [`pad`]."""
        zeros = conv.padding_mode == "zeros"
        padding = tuple(conv._reversed_padding_repeated_twice) if zeros else (0,) * (2 * len(conv.kernel_size))
        return cls(conv.kernel_size, conv.stride, conv.dilation, padding, conv.groups)

    def pack(self) -> list[int]:
        """As the ops take it."""
        return [len(self.kernel), *self.kernel, *self.stride, *self.dilation, *self.padding, self.groups]

    @classmethod
    def unpack(cls, numbers: Sequence[int]) -> ConvGeometry:
        """The inverse of `pack`."""
        dims, *rest = numbers
        parts = [tuple(rest[start * dims : (start + 1) * dims]) for start in range(3)]
        return cls(parts[0], parts[1], parts[2], tuple(rest[3 * dims : 5 * dims]), rest[5 * dims])

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.kernel)

    def windows(self, padded: Tensor, size: Sequence[int]) -> Tensor:
        """All windows at once: a view `[samples, channels, *kernel, *size]` of a padded input."""
        samples, channels, *spatial = padded.stride()
        steps = (
            *(stride * dilation for stride, dilation in zip(spatial, self.dilation, strict=True)),
            *(stride * step for stride, step in zip(spatial, self.stride, strict=True)),
        )
        shape = (*padded.shape[:2], *self.kernel, *size)
        return padded.as_strided(shape, (samples, channels, *steps), padded.storage_offset())


def pad(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Pad the input of a layer whose padding mode is not zeros."""
    if conv.padding_mode == "zeros":
        return x
    return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
