"""The bypass path: `result + S(values) x` at a cost that follows entries × tokens, on any base layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..support import Support
from .bags import accumulation_dtype, add_into, input_gradient_into, values_gradient
from .batching import vmap_rule
from .derivatives import call, register_update
from .experts import add_of_experts, input_gradient_of_experts, values_gradient_of_experts


@torch.library.custom_op("peft_ext::bypass_linear", mutates_args=())
def bypass_linear(
    result: Tensor,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    transposed_entries: Tensor | None,
    transposed_offsets: Tensor | None,
    ends: Tensor | None,
) -> Tensor:
    """[`bypass`] for two-dimensional activations, rounded once to the dtype of `result`."""
    out = torch.empty_like(result, memory_format=torch.contiguous_format)
    if ends is not None:
        return add_of_experts(out, result, x, values, indices, offsets, ends)
    return add_into(out, result, x, values, indices, offsets)


@bypass_linear.register_fake
def _(result: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(result, memory_format=torch.contiguous_format)


@torch.library.custom_op("peft_ext::sparse_grad_values", mutates_args=())
def sparse_grad_values(
    grad: Tensor, x: Tensor, indices: Tensor, offsets: Tensor | None, transposed_entries: Tensor | None,
    transposed_offsets: Tensor | None, ends: Tensor | None,
) -> Tensor:  # fmt: skip
    """`grad^T x` at the support only: `grad` `[tokens, rows]`, `x` `[tokens, fan_in]`; fp32 (or fp64)."""
    if ends is not None:
        return values_gradient_of_experts(grad, x, indices, offsets, ends)
    return values_gradient(grad, x, indices, offsets)


@sparse_grad_values.register_fake
def _(grad: Tensor, x: Tensor, indices: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty(indices.shape, dtype=accumulation_dtype(grad, x))


@torch.library.custom_op("peft_ext::sparse_grad_input", mutates_args=())
def sparse_grad_input(
    grad: Tensor, size: Sequence[int], dtype: torch.dtype, values: Tensor, indices: Tensor, offsets: Tensor | None,
    transposed_entries: Tensor | None, transposed_offsets: Tensor | None, ends: Tensor | None,
) -> Tensor:  # fmt: skip
    """`S^T grad` through the transposed table, so without atomics: `[tokens, *size]` in `dtype`."""
    out = grad.new_empty((len(grad), *size), dtype=dtype)
    if transposed_entries is None or transposed_offsets is None:
        experts = 1 if ends is None else len(ends)
        transposed_entries, transposed_offsets = Support(indices, out.shape[1], offsets).transposed(experts)
    support = (values, indices, offsets, transposed_entries, transposed_offsets)
    if ends is not None:
        return input_gradient_of_experts(out, grad, *support, ends)
    return input_gradient_into(out, grad, *support)


@sparse_grad_input.register_fake
def _(grad: Tensor, size: Sequence[int], dtype: torch.dtype, *rest: Any) -> Tensor:
    return grad.new_empty((grad.shape[0], *size), dtype=dtype)


register_update(bypass_linear, sparse_grad_input, sparse_grad_values)
for _op, _activations in ((bypass_linear, 2), (sparse_grad_input, 1), (sparse_grad_values, 0)):
    _op.register_vmap(vmap_rule(_op, _activations))


def bypass(
    result: Tensor,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    transposed_entries: Tensor,
    transposed_offsets: Tensor,
    ends: Tensor | None = None,
) -> Tensor:
    """
    Add the sparse update to a base layer's output; differentiable in `result`, `x` and `values`.

    Args:
        result (`torch.Tensor`): `[..., rows]`.
        x (`torch.Tensor`): `[..., fan_in]`, the base layer's input; saved for backward as it is, in its dtype.
        values, indices, offsets: the support, see [`Support`]; that of experts is over the rows of all of them.
        transposed_entries, transposed_offsets: from [`Support.transposed`], with the number of experts.
        ends (`torch.Tensor`, *optional*): of experts, integer `[experts]`: where the tokens of each one end. `result`
            and `x` are then sorted by expert, and `rows` are one expert's. What lies behind the last end stays as it
            is.

    Returns:
        `torch.Tensor`: `[..., rows]` in the dtype of `result`.
    """
    rows = result.shape[-1]
    support = (values, indices, offsets, transposed_entries, transposed_offsets)
    out = call(bypass_linear, result.reshape(-1, rows), x.reshape(-1, x.shape[-1]), *support, ends)
    return out.view(*result.shape[:-1], rows)
