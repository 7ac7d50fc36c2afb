"""The dense path for dense supports: W + S is composed on the fly in forward and again in backward, never kept.

Where a neuron trains a large share of its inputs, one dense weight gradient per layer, gathered at once and freed, is
cheaper than products entry by entry. The optimiser's state stays sparse.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..support import Support
from .derivatives import register_derivative
from .reference import dense_delta


def _composed(weight: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
    support = Support(indices, weight.shape[1], offsets)
    composed = weight.detach().clone(memory_format=torch.contiguous_format)
    support.scatter_(composed, (support.gather(composed) + values).to(composed.dtype))
    return composed


@torch.library.custom_op("peft_ext::dense_linear", mutates_args=())
def _dense_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor, offsets: Tensor | None
) -> Tensor:
    return F.linear(x, _composed(weight, values, indices, offsets), bias)


@_dense_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor, offsets: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("peft_ext::dense_grad_input", mutates_args=())
def _dense_grad_input(grad: Tensor, weight: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
    return grad @ _composed(weight, values, indices, offsets)


@_dense_grad_input.register_fake
def _(grad: Tensor, weight: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
    return grad.new_empty(grad.shape[0], weight.shape[1])


@torch.library.custom_op("peft_ext::dense_grad_values", mutates_args=())
def _dense_grad_values(grad: Tensor, x: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
    return Support(indices, x.shape[1], offsets).gather(grad.t() @ x)


@_dense_grad_values.register_fake
def _(grad: Tensor, x: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
    return grad.new_empty(indices.shape)


def _setup_context(ctx, needed, inputs) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, values, indices, offsets = inputs
    ctx.save_for_backward(x if needed[3] else None, weight, values, indices, offsets)


def _backward(ctx, needed, grad: Tensor):  # type: ignore[no-untyped-def]
    x, weight, values, indices, offsets = ctx.saved_tensors
    grad_x = _dense_grad_input(grad, weight, values, indices, offsets) if needed[0] else None
    grad_bias = grad.sum(0) if needed[2] else None
    grad_values = None
    if needed[3]:
        grad_values = _dense_grad_values(grad, x, indices, offsets).to(values.dtype)
    return grad_x, None, grad_bias, grad_values, None, None


def _setup_gradient(ctx, needed, inputs) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward_grad_input(ctx, needed, grad: Tensor):  # type: ignore[no-untyped-def]
    outer, weight, values, indices, offsets = ctx.saved_tensors
    grad_outer = _dense_linear(grad, weight, None, values, indices, offsets) if needed[0] else None
    grad_values = _dense_grad_values(outer, grad, indices, offsets).to(values.dtype) if needed[2] else None
    return grad_outer, None, grad_values, None, None


def _backward_grad_values(ctx, needed, grad: Tensor):  # type: ignore[no-untyped-def]
    outer, x, indices, offsets = ctx.saved_tensors
    update = dense_delta(grad, indices, x.shape[1], offsets).to(x.dtype)
    return x @ update.t() if needed[0] else None, outer @ update if needed[1] else None, None, None


register_derivative(_dense_linear, _setup_context, _backward)
register_derivative(_dense_grad_input, _setup_gradient, _backward_grad_input)
register_derivative(_dense_grad_values, _setup_gradient, _backward_grad_values)


def dense(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor, offsets: Tensor | None
) -> Tensor:
    """
    `(W + S(values)) x + b`, W + S rounded to the weight's dtype; differentiable in `x`, `bias` and `values`.

    Args:
        x (`torch.Tensor`): `[..., fan_in]` in the weight's dtype; the only tensor saved for backward.
        weight (`torch.Tensor`): frozen, `[rows, fan_in]`.
        bias (`torch.Tensor`, *optional*): `[rows]`.
        values, indices, offsets: any support, see [`Support`].
    """
    out = _dense_linear(x.reshape(-1, x.shape[-1]), weight, bias, values, indices, offsets)
    return out.view(*x.shape[:-1], weight.shape[0])
