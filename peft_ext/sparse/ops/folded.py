"""The folded path: the values sit inside the base weight while a product runs, so only their gradient costs extra.

Forward and input gradient are the base layer's own dense products. The values are written into the weight at the
support just before a product and the original bits are written back right after it, inside one op: whoever reads the
weight between two ops (a state dict, a copy, a merge, another adapter) sees the original.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .bypass import sparse_grad_values
from .derivatives import register_derivative
from .folding import folded_in


@torch.library.custom_op("peft_ext::folded_linear", mutates_args=())
def _folded_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor, offsets: Tensor | None
) -> Tensor:
    with folded_in(weight, values, indices, offsets) as folded:
        return F.linear(x, folded, bias)


@_folded_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor, offsets: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("peft_ext::folded_grad_input", mutates_args=())
def _folded_grad_input(
    grad: Tensor, weight: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None
) -> Tensor:
    with folded_in(weight, values, indices, offsets) as folded:
        return grad @ folded


@_folded_grad_input.register_fake
def _(grad: Tensor, weight: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
    return grad.new_empty(grad.shape[0], weight.shape[1])


def _setup_context(ctx, needed, inputs) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, values, indices, offsets = inputs
    ctx.save_for_backward(x if needed[3] else None, weight, values, indices, offsets)


def _backward(ctx, needed, grad: Tensor):  # type: ignore[no-untyped-def]
    x, weight, values, indices, offsets = ctx.saved_tensors
    grad_x = _folded_grad_input(grad, weight, values, indices, offsets) if needed[0] else None
    grad_bias = grad.sum(0) if needed[2] else None
    grad_values = None
    if needed[3]:
        grad_values = sparse_grad_values(grad, x, indices, offsets).to(values.dtype)
    return grad_x, None, grad_bias, grad_values, None, None


def _setup_grad_input(ctx, needed, inputs) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward_grad_input(ctx, needed, grad: Tensor):  # type: ignore[no-untyped-def]
    outer, weight, values, indices, offsets = ctx.saved_tensors
    grad_outer = _folded_linear(grad, weight, None, values, indices, offsets) if needed[0] else None
    grad_values = sparse_grad_values(outer, grad, indices, offsets).to(values.dtype) if needed[2] else None
    return grad_outer, None, grad_values, None, None


register_derivative(_folded_linear, _setup_context, _backward)
register_derivative(_folded_grad_input, _setup_grad_input, _backward_grad_input)


def folded(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor, offsets: Tensor | None
) -> Tensor:
    """
    `(W + S(values)) x + b` with W + S rounded to the weight's dtype; differentiable in `x`, `bias` and `values`.

    Args:
        x (`torch.Tensor`): `[..., fan_in]` in the weight's dtype; the only tensor saved for backward.
        weight (`torch.Tensor`): frozen, `[rows, fan_in]`; bit for bit the same afterwards.
        bias (`torch.Tensor`, *optional*): `[rows]`.
        values, indices, offsets: any support, see [`Support`].
    """
    out = _folded_linear(x.reshape(-1, x.shape[-1]), weight, bias, values, indices, offsets)
    return out.view(*x.shape[:-1], weight.shape[0])
