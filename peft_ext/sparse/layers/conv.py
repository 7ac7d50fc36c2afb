"""Convolutions: a neuron is an output channel, its inputs the flattened `[channels / groups, *kernel]`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...hf.internals import QuantizationBackend
from ..bases.padding import OwnPadding, convolved, has_own_forward
from ..ops import choose_conv_backend, copied, dense, folded
from ..ops.reference import sparse_product
from .base import SparseLayer


class SparseConv(SparseLayer):
    """
    An `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` with sparse adapters: any groups, stride, dilation and padding, also
    padding by a subclass's own forward.
    """

    def __init__(self, base_layer: nn.Module, quantization_backend: QuantizationBackend | None = None) -> None:
        super().__init__(base_layer, quantization_backend)
        base = self.get_base_layer()
        self.own_padding = OwnPadding.of(base) if has_own_forward(base) else None

    def _with_base(self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        delta = self.ready(adapter_name, x)
        weight = self._plain_weight(delta)
        entries, groups = delta.indices.numel(), self.get_base_layer().groups
        path = choose_conv_backend(self.backends[adapter_name], x, weight, entries, groups)
        if weight is None or path == "bypass":
            return self._add(adapter_name, self._base_result(x, *args, **kwargs), x)
        base_layer = self.get_base_layer()
        bias = self._bias_with(delta)
        x, geometry = convolved(base_layer, self.own_padding, x)
        if path in ("copied", "reference"):
            convolve = copied if path == "copied" else sparse_product
            return convolve(x, weight, bias, delta.values, delta.indices, delta.offsets, geometry)
        return (dense if path == "dense" else folded)(x, weight, bias, delta.values, *delta.tables, geometry)

    def _add(self, adapter_name: str, result: Tensor, x: Tensor) -> Tensor:
        return self.ready(adapter_name, x)(result, *convolved(self.get_base_layer(), self.own_padding, x))
