"""The dense path for dense supports: W + S is composed on the fly in forward and again in backward, never kept.

Where a neuron trains a large share of its inputs, one dense weight gradient per layer, gathered at once and freed, is
cheaper than products entry by entry. The optimiser's state stays sparse.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..support import Support
from .composed import linear_with
from .derivatives import register_derivative, save_inputs
from .reference import dense_delta


@contextmanager
def _composed(weight: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None) -> Iterator[Tensor]:
    support = Support(indices, weight.shape[1], offsets)
    composed = weight.detach().clone(memory_format=torch.contiguous_format)
    support.scatter_(composed, (support.gather(composed) + values).to(composed.dtype))
    yield composed


@torch.library.custom_op("peft_ext::dense_grad_values", mutates_args=())
def _grad_values(grad: Tensor, x: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
    return Support(indices, x.shape[1], offsets).gather(grad.t() @ x)


@_grad_values.register_fake
def _(grad: Tensor, x: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
    return grad.new_empty(indices.shape)


def _backward_grad_values(ctx, needed, grad: Tensor):  # type: ignore[no-untyped-def]
    outer, x, indices, offsets = ctx.saved_tensors
    update = dense_delta(grad, indices, x.shape[1], offsets).to(x.dtype)
    return x @ update.t() if needed[0] else None, outer @ update if needed[1] else None, None, None


register_derivative(_grad_values, save_inputs, _backward_grad_values)

# `(W + S(values)) x + b`, see `linear_with`.
dense = linear_with("dense", _composed, _grad_values)
