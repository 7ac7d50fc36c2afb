"""The bypass in operators that every exporter knows, for ONNX: a dense update beside the base layer."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from .base_products import product
from .geometry import ConvGeometry
from .reference import dense_delta


_EXPORTERS = ("torch.onnx._internal.exporter._flags", "torch.onnx._internal.torchscript_exporter._globals")


def is_exporting_to_onnx() -> bool:
    """Whether `torch.onnx.export` is at work."""
    if torch.compiler.is_dynamo_compiling():
        return False
    # torch's own answer imports the exporters, which no forward pass should; while one is at work it is there.
    return any(name in sys.modules for name in _EXPORTERS) and torch.onnx.is_in_onnx_export()


def standard_update(
    result: Tensor,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    fan_in: int,
    geometry: ConvGeometry | None,
) -> Tensor:
    """`result + S x`: `result` `[..., rows]`, `x` `[..., fan_in]`; with `geometry`, as a convolution has them."""
    if offsets is None:
        delta = dense_delta(values, indices, fan_in).to(x.dtype)
    else:
        zeros = values.new_zeros(offsets.numel() - 1, fan_in)
        delta = zeros.index_put((_rows(indices, offsets), indices.long()), values).to(x.dtype)
    if geometry is None:
        return result + product(x, delta, None, []).to(result.dtype)
    weight = delta.view(-1, fan_in // geometry.taps, *geometry.kernel)
    return result + product(x, weight, None, geometry.pack()).to(result.dtype)


def _rows(indices: Tensor, offsets: Tensor) -> Tensor:
    """Row of each entry: how many rows have begun, since exporters don't know `repeat_interleave` with a size."""
    begun = torch.zeros(indices.numel() + 1, dtype=torch.int64, device=indices.device)
    begun = begun.index_put((offsets[1:-1].long(),), torch.ones_like(offsets[1:-1]).long(), accumulate=True)
    return begun.cumsum(0)[:-1]
