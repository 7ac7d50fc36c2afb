"""
Products with `W + S(values)`, and their gradients of any order. The folded and the dense path differ in where that sum
lies, and in how the gradient of the values is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from . import base_products
from .derivatives import register_derivative, save, save_inputs, saved
from .geometry import ConvGeometry


Composed = Callable[[Tensor, Tensor, Tensor, Tensor | None], AbstractContextManager[Tensor]]


class ComposedPath:
    """
    `(W + S(values)) x + b` with W + S rounded to the weight's dtype; differentiable in `x`, `bias` and `values`.

    Args:
        name (`str`): what the names of the operators begin with, which are registered here.
        composed (`Callable`): takes a weight, values, indices and offsets, and gives a context with their sum.
        grad_values (`Callable`): `grad^T x` at the support, of `grad`, `x`, indices, offsets, the entries by tap and a
            packed geometry.
    """

    def __init__(self, name: str, composed: Composed, grad_values: Callable[..., Tensor]) -> None:
        @torch.library.custom_op(f"peft_ext::{name}_product", mutates_args=())
        def product(
            x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor, offsets: Tensor | None,
            tap_entries: Tensor | None, tap_ends: Tensor | None, geometry: Sequence[int],
        ) -> Tensor:  # fmt: skip
            with composed(weight, values, indices, offsets) as whole:
                result = base_products.product(x, whole, bias, geometry)
            # In one dimension torch gives a view, which autograd would not let a model change in place.
            if result._is_view():
                result = result.new_empty(0).set_(
                    result.untyped_storage(), result.storage_offset(), result.shape, result.stride()
                )
            return result

        @torch.library.custom_op(f"peft_ext::{name}_grad_input", mutates_args=())
        def grad_input(
            grad: Tensor, size: Sequence[int], weight: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None,
            tap_entries: Tensor | None, tap_ends: Tensor | None, geometry: Sequence[int],
        ) -> Tensor:  # fmt: skip
            with composed(weight, values, indices, offsets) as whole:
                return base_products.input_gradient(grad, whole, size, geometry)

        @product.register_fake
        def _(x: Tensor, weight: Tensor, bias: Tensor | None, *support: Any) -> Tensor:
            return base_products.product(x, weight, bias, support[-1])

        @grad_input.register_fake
        def _(grad: Tensor, size: Sequence[int], *rest: Any) -> Tensor:
            return grad.new_empty(tuple(size))

        def setup(ctx: Any, needed: Sequence[bool], inputs: Sequence[Any]) -> None:
            x, weight, _, *support = inputs
            save(ctx, x if needed[3] else None, x.shape, weight, *support)

        def backward(ctx: Any, needed: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
            x, size, weight, values, *places = saved(ctx)
            grad_x = grad_input(grad, size, weight, values, *places) if needed[0] else None
            grad_bias = grad.sum([0, *range(2, grad.dim())]) if needed[2] else None
            return grad_x, None, grad_bias, of_values(needed[3], grad, x, values, places), *(None,) * len(places)

        def backward_grad_input(ctx: Any, needed: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
            outer, _, weight, values, *places = saved(ctx)
            grad_outer = product(grad, weight, None, values, *places) if needed[0] else None
            return grad_outer, None, None, of_values(needed[3], outer, grad, values, places), *(None,) * len(places)

        def of_values(needed: bool, grad: Tensor, x: Tensor, values: Tensor, places: Sequence[Any]) -> Tensor | None:
            return grad_values(grad, x, *places).to(values.dtype) if needed else None

        register_derivative(product, setup, backward)
        register_derivative(grad_input, save_inputs, backward_grad_input)
        self._product = product

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        indices: Tensor,
        offsets: Tensor | None,
        tap_entries: Tensor | None = None,
        tap_ends: Tensor | None = None,
        geometry: ConvGeometry | None = None,
    ) -> Tensor:
        """
        Args:
            x (`torch.Tensor`): `[..., fan_in]`, of a convolution `[samples, channels, *size]` or `[channels, *size]`,
                in the weight's dtype. The only tensor saved for backward.
            weight (`torch.Tensor`): frozen, any strides: `[rows, fan_in]`, or `[rows, channels / groups, *kernel]`.
                Bit for bit the same afterwards.
            bias (`torch.Tensor`, *optional*): `[rows]`.
            values, indices, offsets: any support of the weight flattened to `[rows, fan_in]`, see [`Support`].
            tap_entries, tap_ends: of a convolution, from [`entries_by_tap`].
            geometry ([`ConvGeometry`], *optional*): of a convolution.
        """
        support = (values, indices, offsets, tap_entries, tap_ends)
        if geometry is None:
            result = self._product(x.reshape(-1, x.shape[-1]), weight, bias, *support, [])
            return result.view(*x.shape[:-1], weight.shape[0])
        if x.dim() < weight.dim():
            return self._product(x[None], weight, bias, *support, geometry.pack()).squeeze(0)
        return self._product(x, weight, bias, *support, geometry.pack())
