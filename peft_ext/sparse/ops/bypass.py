"""The bypass path: `result + S(values) x` at a cost that follows entries × tokens, on any base layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..support import Support
from .bags import accumulation_dtype, add_into, input_gradient_into, values_gradient
from .batching import vmap_rule
from .derivatives import call, register_derivative, save_inputs


@torch.library.custom_op("peft_ext::sparse_add", mutates_args=())
def sparse_add(result: Tensor, x: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
    """
    `result + S x`, rounded once to the dtype of `result`.

    Args:
        result (`torch.Tensor`): `[tokens, rows]`, the base layer's output.
        x (`torch.Tensor`): `[tokens, fan_in]`.
        values (`torch.Tensor`): `[rows, k]`, or `[entries]` with `offsets`.
        indices (`torch.Tensor`): int32 in the shape of `values`.
        offsets (`torch.Tensor`, *optional*): int32 `[rows + 1]` for a ragged support.
    """
    out = torch.empty_like(result, memory_format=torch.contiguous_format)
    return add_into(out, result, x, values, indices, offsets)


@sparse_add.register_fake
def _like_result(result: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(result, memory_format=torch.contiguous_format)


@torch.library.custom_op("peft_ext::sparse_grad_values", mutates_args=())
def sparse_grad_values(grad: Tensor, x: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
    """`grad^T x` at the support only: `grad` `[tokens, rows]`, `x` `[tokens, fan_in]`; fp32 (or fp64)."""
    return values_gradient(grad, x, indices, offsets)


@sparse_grad_values.register_fake
def _(grad: Tensor, x: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
    return grad.new_empty(indices.shape, dtype=accumulation_dtype(grad, x))


@torch.library.custom_op("peft_ext::sparse_grad_input", mutates_args=())
def sparse_grad_input(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    transposed_entries: Tensor,
    transposed_offsets: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`S^T grad` through the transposed table, so without atomics: `[tokens, fan_in]` in `dtype`."""
    out = torch.empty(grad.shape[0], transposed_offsets.numel() - 1, dtype=dtype, device=grad.device)
    return input_gradient_into(out, grad, values, indices, offsets, transposed_entries, transposed_offsets)


@sparse_grad_input.register_fake
def _(grad: Tensor, *rest: Any) -> Tensor:
    *_, transposed_offsets, dtype = rest
    return grad.new_empty(grad.shape[0], transposed_offsets.shape[0] - 1, dtype=dtype)


@torch.library.custom_op("peft_ext::bypass_linear", mutates_args=())
def bypass_linear(
    result: Tensor,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    transposed_entries: Tensor,
    transposed_offsets: Tensor,
) -> Tensor:
    """[`sparse_add`] with a gradient, for two-dimensional activations; see [`bypass`]."""
    return sparse_add(result, x, values, indices, offsets)


bypass_linear.register_fake(_like_result)


# ---------------------------------------------------------------------- derivatives


def register_derivatives(product: Any, grad_values: Any, grad_input: Any) -> None:
    """
    Tell autograd how three operators belong together: [`bypass_linear`], [`sparse_grad_values`] and
    [`sparse_grad_input`], or those that take `ends` after the support, too; see [`expert_bypass`].
    """

    def setup(ctx, needed, inputs) -> None:  # type: ignore[no-untyped-def]
        _, x, values, *support = inputs
        ctx.x_dtype = x.dtype
        ctx.save_for_backward(x if needed[2] else None, values, *support)

    def setup_grad_input(ctx, needed, inputs) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs[:-1])

    def of_values(grad: Tensor, x: Tensor, values: Tensor, support: list[Any]) -> Tensor:
        return call(grad_values, grad, x, *support[:2], *support[4:]).to(values.dtype)

    def backward(ctx, needed, grad: Tensor):  # type: ignore[no-untyped-def]
        x, values, *support = ctx.saved_tensors
        grad_x = call(grad_input, grad, values, *support, ctx.x_dtype) if needed[1] else None
        return grad, grad_x, of_values(grad, x, values, support) if needed[2] else None, *(None for _ in support)

    def backward_grad_values(ctx, needed, grad: Tensor):  # type: ignore[no-untyped-def]
        outer, x, indices, offsets, *ends = ctx.saved_tensors
        support = (indices, offsets, *Support(indices, x.shape[-1], offsets).transposed(*map(len, ends)), *ends)
        grad_outer = call(product, torch.zeros_like(outer), x, grad, *support) if needed[0] else None
        grad_x = call(grad_input, outer, grad, *support, x.dtype) if needed[1] else None
        return grad_outer, grad_x, None, None, *(None for _ in ends)

    def backward_grad_input(ctx, needed, grad: Tensor):  # type: ignore[no-untyped-def]
        outer, values, *support = ctx.saved_tensors
        grad_outer = call(product, torch.zeros_like(outer), grad, values, *support) if needed[0] else None
        return (
            grad_outer,
            of_values(outer, grad, values, support) if needed[1] else None,
            *(None for _ in support),
            None,
        )

    register_derivative(product, setup, backward)
    register_derivative(grad_values, save_inputs, backward_grad_values)
    register_derivative(grad_input, setup_grad_input, backward_grad_input)


register_derivatives(bypass_linear, sparse_grad_values, sparse_grad_input)

for _op, _activations in ((sparse_add, 2), (bypass_linear, 2), (sparse_grad_input, 1), (sparse_grad_values, 0)):
    _op.register_vmap(vmap_rule(_op, _activations))


def bypass(
    result: Tensor,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    transposed_entries: Tensor,
    transposed_offsets: Tensor,
) -> Tensor:
    """
    Add the sparse update to a base layer's output; differentiable in `result`, `x` and `values`.

    Args:
        result (`torch.Tensor`): `[..., rows]`.
        x (`torch.Tensor`): `[..., fan_in]`, the base layer's input; saved for backward as it is, in its dtype.
        values, indices, offsets: the support, see [`Support`].
        transposed_entries, transposed_offsets: from [`Support.transposed`].

    Returns:
        `torch.Tensor`: `[..., rows]` in the dtype of `result`.
    """
    rows = result.shape[-1]
    out = call(
        bypass_linear,
        result.reshape(-1, rows),
        x.reshape(-1, x.shape[-1]),
        values,
        indices,
        offsets,
        transposed_entries,
        transposed_offsets,
    )
    return out.view(*result.shape[:-1], rows)
