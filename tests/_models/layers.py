"""One layer of every kind that takes a sparse update, an input for each, and the same layer with another weight."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Kind:
    """How a layer is made, and the size of one sample of its input."""

    make: Callable[[], nn.Module]
    size: tuple[int, ...] = ()

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
        """A frozen layer with random weights."""
        generator = torch.Generator().manual_seed(seed)
        layer = self.make()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return layer.to(dtype).requires_grad_(False)

    def draw(self, dtype: torch.dtype = torch.float64, samples: int = 3) -> Tensor:
        """A batch that takes gradients."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(samples, *self.size, generator=generator).to(dtype).requires_grad_()


class DynamicSame(nn.Conv2d):
    """As timm's `Conv2dSame`: by the size of the input."""

    def forward(self, x):
        zeros = []
        for n, k, stride, dilation in zip(x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True):
            total = max((-(n // -stride) - 1) * stride + (k - 1) * dilation + 1 - n, 0)
            zeros = [total // 2, total - total // 2, *zeros]
        return F.conv2d(F.pad(x, zeros), self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class StaticSame(nn.Conv2d):
    """As EfficientNet-Lite's `Conv2dStaticSamePadding`: by a module, for the size of image that it was made for."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x):
        return F.conv2d(self.static_padding(x), self.weight, self.bias, self.stride, self.padding, self.dilation)


class InConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(F.pad(x, (0, 1, 2, 1)), weight, bias)


class Causal(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


def _conv(dims: int, channels: tuple[int, int] = (4, 6), **options: Any) -> Kind:
    make = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    options = {"kernel_size": 3, **options}
    return Kind(lambda: make(*channels, **options), (channels[0], *(7, 6, 5)[:dims]))


def _channels_last(kind: Kind) -> Kind:
    return Kind(lambda: kind.make().to(memory_format=torch.channels_last), kind.size)


LINEARS = {
    "Linear": Kind(lambda: nn.Linear(9, 6), (4, 9)),
    "Linear on rows": Kind(lambda: nn.Linear(9, 6), (9,)),
    "Conv1D": Kind(lambda: Conv1D(6, 9), (4, 9)),
}
CONVS = {
    "1d": _conv(1),
    "1d same, even kernel": _conv(1, kernel_size=4, padding="same"),
    "1d circular, grouped": _conv(1, padding=2, padding_mode="circular", groups=2),
    "2d": _conv(2, padding=1),
    "2d without bias": _conv(2, bias=False),
    "2d stride": _conv(2, stride=(2, 1), padding=(1, 2)),
    "2d dilated": _conv(2, dilation=(2, 1), padding=2),
    "2d oblong kernel": _conv(2, kernel_size=(1, 3), padding=(0, 1)),
    "2d pointwise": _conv(2, kernel_size=1),
    "2d patches": _conv(2, kernel_size=(3, 2), stride=(3, 2)),
    "2d grouped": _conv(2, groups=2, padding=1),
    "2d depthwise": _conv(2, (4, 4), groups=4, padding=3, kernel_size=7),
    "2d depthwise, multiplied": _conv(2, (4, 8), groups=4),
    "2d valid": _conv(2, padding="valid"),
    "2d same": _conv(2, padding="same", dilation=2),
    "2d same, even kernel": _conv(2, padding="same", kernel_size=(2, 3)),
    "2d reflect": _conv(2, padding=2, padding_mode="reflect", stride=2),
    "2d replicate": _conv(2, padding=1, padding_mode="replicate"),
    "2d circular, same": _conv(2, padding="same", kernel_size=2, padding_mode="circular"),
    "3d": _conv(3, padding=1, stride=(1, 2, 1)),
    "3d replicate, grouped": _conv(3, padding=1, padding_mode="replicate", groups=2),
}
# Padded by the forward of their own class.
PADDED = {
    "dynamic": Kind(lambda: DynamicSame(4, 6, (3, 5), stride=2), (4, 9, 12)),
    "dynamic, dilated, grouped": Kind(
        lambda: DynamicSame(4, 6, 3, stride=(1, 3), dilation=2, groups=2), (4, 11, 10)
    ),
    "static": Kind(lambda: StaticSame(4, 6, 3, stride=2), (4, 8, 8)),
    "static and padded": Kind(lambda: StaticSame(4, 6, 3, padding=(1, 2)), (4, 7, 8)),
    "in _conv_forward": Kind(lambda: InConvForward(4, 6, 3, bias=False), (4, 5, 6)),
    "causal": Kind(lambda: Causal(4, 6, 3, dilation=2), (4, 11)),
}  # fmt: skip
CHANNELS_LAST = {f"{name}, channels last": _channels_last(CONVS[name]) for name in ("2d", "2d grouped")}
KINDS = LINEARS | CONVS | PADDED | CHANNELS_LAST
# One of each that computes or stores its weight in its own way.
SOME = (
    "Linear", "Conv1D", "1d circular, grouped", "2d same, even kernel", "2d depthwise", "2d grouped, channels last",
    "3d", "dynamic",
)  # fmt: skip


def as_weight(layer: nn.Module, matrix: Tensor) -> Tensor:
    """`[rows, fan_in]` in the shape of a layer's weight."""
    return matrix.t() if isinstance(layer, Conv1D) else matrix.view(layer.weight.shape)


def with_weight(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What a layer computes with another weight and bias, by its own forward and torch's autograd."""
    parameters = {"weight": weight} | ({} if bias is None else {"bias": bias})
    return torch.func.functional_call(layer, parameters, (x,))
