"""The folded path: the values sit inside the base weight while a product runs, so only their gradient costs extra.

Forward and input gradient are the base layer's own dense products. The values are written into the weight at the
support just before a product and the original bits are written back right after it, inside one op: whoever reads the
weight between two ops (a state dict, a copy, a merge, another adapter) sees the original.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from .bypass import sparse_grad_values


# Two threads that fold into one weight would each take the other's values for originals.
_FOLDING = threading.Lock()


@contextmanager
def folded_in(weight: Tensor, values: Tensor, indices: Tensor) -> Iterator[Tensor]:
    """`weight` (`[rows, fan_in]`, any strides) with `values` added at `indices`, in place; restored on exit."""
    index = indices.long()
    target = weight.data  # no version bump: the content is the same outside this context
    with _FOLDING:
        original = target.gather(1, index)
        try:
            target.scatter_(1, index, (original + values).to(target.dtype))
            yield target
        finally:
            target.scatter_(1, index, original)


@torch.library.custom_op("peft_ext::folded_linear", mutates_args=())
def _folded_linear(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor) -> Tensor:
    with folded_in(weight, values, indices) as folded:
        return F.linear(x, folded, bias)


@_folded_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("peft_ext::folded_grad_input", mutates_args=())
def _folded_grad_input(grad: Tensor, weight: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    with folded_in(weight, values, indices) as folded:
        return grad @ folded


@_folded_grad_input.register_fake
def _(grad: Tensor, weight: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[0], weight.shape[1])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, values, indices = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, values, indices)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    x, weight, values, indices = ctx.saved_tensors
    grad_x = _folded_grad_input(grad, weight, values, indices) if ctx.needs_input_grad[0] else None
    grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
    grad_values = None
    if ctx.needs_input_grad[3]:
        grad_values = sparse_grad_values(grad, x, indices, None).to(values.dtype)
    return grad_x, None, grad_bias, grad_values, None


_folded_linear.register_autograd(_backward, setup_context=_setup_context)


def folded(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor) -> Tensor:
    """
    `(W + S(values)) x + b` with W + S rounded to the weight's dtype; differentiable in `x`, `bias` and `values`.

    Args:
        x (`torch.Tensor`): `[..., fan_in]` in the weight's dtype; the only tensor saved for backward.
        weight (`torch.Tensor`): frozen, `[rows, fan_in]`; bit for bit the same afterwards.
        bias (`torch.Tensor`, *optional*): `[rows]`.
        values, indices (`torch.Tensor`): a table support, `[rows, k]`.
    """
    out = _folded_linear(x.reshape(-1, x.shape[-1]), weight, bias, values, indices)
    return out.view(*x.shape[:-1], weight.shape[0])
