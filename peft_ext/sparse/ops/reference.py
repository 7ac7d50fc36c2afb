"""The dense oracle: every path is tested against it, output and every gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..support import row_of_entry
from .base_products import product
from .geometry import ConvGeometry


def dense_delta(values: Tensor, indices: Tensor, fan_in: int, offsets: Tensor | None = None) -> Tensor:
    """The sparse update as a dense `[rows, fan_in]` matrix, differentiable in `values` (any shape of a support)."""
    rows = indices.shape[0] if offsets is None else offsets.numel() - 1
    zeros = torch.zeros(rows, fan_in, dtype=values.dtype, device=values.device)
    return zeros.index_put((row_of_entry(indices, offsets), indices.reshape(-1).long()), values.reshape(-1))


def sparse_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor, offsets: Tensor | None = None,
    geometry: ConvGeometry | None = None,
) -> Tensor:  # fmt: skip
    """
    `y = W x + S(values) x + b` with a dense S.

    Args:
        x (`torch.Tensor`): `[..., fan_in]`; of a convolution `[samples, channels, *size]`, or one sample.
        weight (`torch.Tensor`): `[rows, fan_in]`, or `[rows, channels / groups, *kernel]`.
        bias (`torch.Tensor`, *optional*): `[rows]`.
        values (`torch.Tensor`): `[rows, k]`, or `[entries]` for a ragged support.
        indices (`torch.Tensor`): integer, in the shape of `values`.
        offsets (`torch.Tensor`, *optional*): `[rows + 1]` for a ragged support.
        geometry ([`ConvGeometry`], *optional*): of a convolution.
    """
    delta = dense_delta(values, indices, weight[0].numel(), offsets).view(weight.shape)
    return product(x, weight + delta.to(weight.dtype), bias, [] if geometry is None else geometry.pack())
