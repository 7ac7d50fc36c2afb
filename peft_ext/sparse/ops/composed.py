"""
Products with `W + S(values)`, and their gradients of any order. The folded and the dense path differ in where that sum
lies, and in how the gradient of the values is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .derivatives import register_derivative, save_inputs


Composed = Callable[[Tensor, Tensor, Tensor, Tensor | None], AbstractContextManager[Tensor]]
Linear = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None], Tensor]


def linear_with(path: str, composed: Composed, grad_values: Callable[..., Tensor]) -> Linear:
    """
    Register the operators of a path for linear layers.

    Args:
        path (`str`): what their names begin with.
        composed (`Callable`): takes a weight `[rows, fan_in]`, values, indices and offsets, and gives a context with
            their sum.
        grad_values (`Callable`): the operator for `grad^T x` at the support, of `grad`, `x`, indices and offsets.

    Returns:
        The product as a function of `x`, weight, bias, values, indices and offsets, with `x` `[..., fan_in]` in the
        weight's dtype. `W + S` is rounded to the weight's dtype. `x` is the only tensor saved for backward.
    """

    @torch.library.custom_op(f"peft_ext::{path}_linear", mutates_args=())
    def product(
        x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor, offsets: Tensor | None
    ) -> Tensor:
        with composed(weight, values, indices, offsets) as whole:
            return F.linear(x, whole, bias)

    @torch.library.custom_op(f"peft_ext::{path}_grad_input", mutates_args=())
    def grad_input(grad: Tensor, weight: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
        with composed(weight, values, indices, offsets) as whole:
            return grad @ whole

    @product.register_fake
    def _(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        return x.new_empty(x.shape[0], weight.shape[0])

    @grad_input.register_fake
    def _(grad: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        return grad.new_empty(grad.shape[0], weight.shape[1])

    def setup(ctx, needed, inputs) -> None:  # type: ignore[no-untyped-def]
        x, weight, _, *support = inputs
        ctx.save_for_backward(x if needed[3] else None, weight, *support)

    def backward(ctx, needed, grad: Tensor):  # type: ignore[no-untyped-def]
        x, weight, values, *places = ctx.saved_tensors
        grad_x = grad_input(grad, weight, values, *places) if needed[0] else None
        grad_bias = grad.sum(0) if needed[2] else None
        return grad_x, None, grad_bias, of_values(needed[3], grad, x, values, places), None, None

    def backward_grad_input(ctx, needed, grad: Tensor):  # type: ignore[no-untyped-def]
        outer, weight, values, *places = ctx.saved_tensors
        grad_outer = product(grad, weight, None, values, *places) if needed[0] else None
        return grad_outer, None, of_values(needed[2], outer, grad, values, places), None, None

    def of_values(needed: bool, grad: Tensor, x: Tensor, values: Tensor, places: Any) -> Tensor | None:
        return grad_values(grad, x, *places).to(values.dtype) if needed else None

    register_derivative(product, setup, backward)
    register_derivative(grad_input, save_inputs, backward_grad_input)

    def linear(
        x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor, offsets: Tensor | None
    ) -> Tensor:
        result: Tensor = product(x.reshape(-1, x.shape[-1]), weight, bias, values, indices, offsets)
        return result.view(*x.shape[:-1], weight.shape[0])

    return linear
