"""The folded path: the values sit inside the base weight while a product runs, so only their gradient costs extra.

Forward and input gradient are the base layer's own dense products. The values are written into the weight at the
support just before a product and the original bits are written back right after it, inside one op: whoever reads the
weight between two ops (a state dict, a copy, a merge, another adapter) sees the original.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base_products import product
from .bypass import sparse_grad_values
from .composed import ComposedPath
from .folding import copy_of, flat_places, folded_in
from .geometry import ConvGeometry


def _grad_values(grad: Tensor, x: Tensor, *places: Any) -> Tensor:
    *support, geometry = places
    return sparse_grad_values(grad, x, *support, None, geometry)


# `(W + S(values)) x + b`, see `ComposedPath`; the weight is bit for bit the same afterwards.
folded = ComposedPath("folded", folded_in, _grad_values)


def copied(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor, offsets: Tensor | None,
    geometry: ConvGeometry,
) -> Tensor:  # fmt: skip
    """The same for a convolution in a copy of the weight, so that threads may share it; without gradients."""
    whole = copy_of(weight)
    memory, place = flat_places(whole, indices, offsets)
    memory[place] = (memory[place] + values.detach().reshape(-1)).to(whole.dtype)
    return product(x, whole, bias, geometry.pack())
