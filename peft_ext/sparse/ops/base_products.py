"""
What base layers compute: `W x + b` of a linear layer, or a convolution. The packed [`ConvGeometry`] of a linear layer
is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import ConvGeometry


def product(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]) -> Tensor:
    """`W x + b`, of one sample of a convolution's input too."""
    if not geometry:
        return F.linear(x, weight, bias)
    if x.dim() < weight.dim():
        return product(x[None], weight, bias, geometry).squeeze(0)
    x, even = _evenly_padded(x, ConvGeometry.unpack(geometry))
    return torch.ops.aten.convolution(x, weight, bias, *_plain_arguments(even))


def input_gradient(grad: Tensor, weight: Tensor, size: Sequence[int], geometry: Sequence[int]) -> Tensor:
    """The gradient of an input of `size`."""
    if not geometry:
        return grad @ weight
    shape = ConvGeometry.unpack(geometry)
    like, even = _evenly_padded(_of_shape(grad, size), shape)
    wide = torch.ops.aten.convolution_backward(
        grad, like, weight, None, *_plain_arguments(even), [True, False, False]
    )[0]
    return (wide if even is shape else F.pad(wide, [-width for width in shape.padding])).contiguous()


def weight_gradient(grad: Tensor, x: Tensor, geometry: Sequence[int]) -> Tensor:
    """The gradient of the whole weight."""
    if not geometry:
        return grad.t() @ x
    like = _of_shape(grad, weight_shape(grad.shape[1], x.shape[1], geometry))
    x, even = _evenly_padded(x, ConvGeometry.unpack(geometry))
    return torch.ops.aten.convolution_backward(grad, x, like, None, *_plain_arguments(even), [False, True, False])[1]


def weight_shape(rows: int, channels: int, geometry: Sequence[int]) -> tuple[int, ...]:
    """The shape of a weight with some outputs and inputs."""
    if not geometry:
        return rows, channels
    shape = ConvGeometry.unpack(geometry)
    return rows, channels // shape.groups, *shape.kernel


def _of_shape(tensor: Tensor, size: Sequence[int]) -> Tensor:
    """Stands for a tensor of which only the shape is read."""
    return tensor.new_empty(1).expand(tuple(size))


def _evenly_padded(x: Tensor, geometry: ConvGeometry) -> tuple[Tensor, ConvGeometry]:
    """An input and a geometry that pads both sides alike, which is all that torch's convolution takes."""
    if geometry.padding[::2] == geometry.padding[1::2]:
        return x, geometry
    return F.pad(x, geometry.padding), replace(geometry, padding=(0,) * len(geometry.padding))


def _plain_arguments(geometry: ConvGeometry) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
    """Stride, padding, dilation, transposed, output padding and groups."""
    padding = list(geometry.padding[::2])[::-1]
    return list(geometry.stride), padding, list(geometry.dilation), False, [0] * len(padding), geometry.groups
