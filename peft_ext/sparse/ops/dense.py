"""The dense path for dense supports: W + S is composed on the fly in forward and again in backward, never kept.

Where a neuron trains a large share of its inputs, one dense weight gradient per layer, gathered at once and freed, is
cheaper than products entry by entry. The optimiser's state stays sparse. A convolution has W + S in its own weight, as
in the folded path.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..support import Support
from . import base_products
from .composed import ComposedPath
from .derivatives import register_derivative, save_inputs, saved
from .folding import folded_in
from .reference import dense_delta


@contextmanager
def _composed(weight: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None) -> Iterator[Tensor]:
    if weight.dim() > 2:
        with folded_in(weight, values, indices, offsets) as whole:
            yield whole
        return
    support = Support(indices, weight.shape[1], offsets)
    composed = weight.detach().clone(memory_format=torch.contiguous_format)
    support.scatter_(composed, (support.gather(composed) + values).to(composed.dtype))
    yield composed


@torch.library.custom_op("peft_ext::dense_grad_values", mutates_args=())
def _grad_values(
    grad: Tensor, x: Tensor, indices: Tensor, offsets: Tensor | None, tap_entries: Tensor | None,
    tap_ends: Tensor | None, geometry: Sequence[int],
) -> Tensor:  # fmt: skip
    whole = base_products.weight_gradient(grad, x, geometry).flatten(1)
    return Support(indices, whole.shape[1], offsets).gather(whole)


@_grad_values.register_fake
def _(grad: Tensor, x: Tensor, indices: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty(indices.shape)


def _backward_grad_values(ctx: Any, needed: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
    outer, x, indices, offsets, _, _, geometry = saved(ctx)
    rows, *inputs = base_products.weight_shape(outer.shape[1], x.shape[1], geometry)
    update = dense_delta(grad, indices, math.prod(inputs), offsets).to(x.dtype).view(rows, *inputs)
    grad_outer = base_products.product(x, update, None, geometry) if needed[0] else None
    grad_x = base_products.input_gradient(outer, update, x.shape, geometry) if needed[1] else None
    return grad_outer, grad_x, *(None,) * 5


register_derivative(_grad_values, save_inputs, _backward_grad_values)

# `(W + S(values)) x + b`, see `ComposedPath`.
dense = ComposedPath("dense", _composed, _grad_values)
