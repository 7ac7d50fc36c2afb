"""Convolutions of every form, and what they compute by dense weights."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class ConvCase:
    """A convolution and the size of its input."""

    dims: int
    options: dict[str, Any] = field(default_factory=dict)
    channels: tuple[int, int] = (4, 6)
    size: tuple[int, ...] = (7, 6, 5)

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
        """A frozen layer with random weights."""
        generator = torch.Generator().manual_seed(seed)
        layer = CLASSES[self.dims](*self.channels, **{"kernel_size": 3, **self.options})
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return layer.to(dtype).requires_grad_(False)

    def draw_input(self, dtype: torch.dtype = torch.float64, samples: int = 3) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(samples, self.channels[0], *self.size[: self.dims], generator=generator)
        return x.to(dtype).requires_grad_()


CONVS = {
    "1d": ConvCase(1),
    "1d same, even kernel": ConvCase(1, {"kernel_size": 4, "padding": "same"}),
    "1d circular, grouped": ConvCase(1, {"padding": 2, "padding_mode": "circular", "groups": 2}),
    "2d": ConvCase(2, {"padding": 1}),
    "2d without bias": ConvCase(2, {"bias": False}),
    "2d stride": ConvCase(2, {"stride": (2, 1), "padding": (1, 2)}),
    "2d dilated": ConvCase(2, {"dilation": (2, 1), "padding": 2}),
    "2d oblong kernel": ConvCase(2, {"kernel_size": (1, 3), "padding": (0, 1)}),
    "2d pointwise": ConvCase(2, {"kernel_size": 1}),
    "2d patches": ConvCase(2, {"kernel_size": (3, 2), "stride": (3, 2)}),
    "2d grouped": ConvCase(2, {"groups": 2, "padding": 1}),
    "2d depthwise": ConvCase(2, {"groups": 4, "padding": 3, "kernel_size": 7}, (4, 4)),
    "2d depthwise, multiplied": ConvCase(2, {"groups": 4}, (4, 8)),
    "2d valid": ConvCase(2, {"padding": "valid"}),
    "2d same": ConvCase(2, {"padding": "same", "dilation": 2}),
    "2d same, even kernel": ConvCase(2, {"padding": "same", "kernel_size": (2, 3)}),
    "2d reflect": ConvCase(2, {"padding": 2, "padding_mode": "reflect", "stride": 2}),
    "2d replicate": ConvCase(2, {"padding": 1, "padding_mode": "replicate"}),
    "2d circular, same": ConvCase(2, {"padding": "same", "kernel_size": 2, "padding_mode": "circular"}),
    "3d": ConvCase(3, {"padding": 1, "stride": (1, 2, 1)}),
    "3d replicate, grouped": ConvCase(3, {"padding": 1, "padding_mode": "replicate", "groups": 2}),
}


def dense_conv(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The layer with another weight, by torch's own convolution and autograd."""
    other = copy.deepcopy(layer)
    del other.weight
    other.weight = weight
    return other(x)
