"""The bypass path: `result + S(values) x` at a cost that follows entries × tokens, on any base layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..support import Support
from .bags import accumulation_dtype, add_into, input_gradient_into, values_gradient
from .batching import vmap_rule
from .conv import Entries, add_of_convolution, input_gradient_of_convolution, values_gradient_of_convolution
from .derivatives import call, register_derivative, save, save_inputs, saved
from .experts import add_of_experts, input_gradient_of_experts, values_gradient_of_experts
from .geometry import ConvGeometry


# All three operators take the same about the update: its support, the transposed table, the `ends` of experts, and the
# packed geometry of a convolution, which is empty for other layers. Where the table is left out, it is made.


@torch.library.custom_op("peft_ext::bypass_product", mutates_args=())
def bypass_product(
    result: Tensor, x: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None,
    transposed_entries: Tensor | None, transposed_offsets: Tensor | None, ends: Tensor | None, geometry: Sequence[int],
) -> Tensor:  # fmt: skip
    """[`bypass`] for several tokens or samples, rounded once to the dtype of `result`."""
    if geometry:
        tables = (transposed_entries, transposed_offsets)
        own = Entries.of(indices, offsets, *tables, geometry, result.shape[1], x.shape[1])
        return add_of_convolution(result, x, values, own)
    out = torch.empty_like(result, memory_format=torch.contiguous_format)
    if ends is not None:
        return add_of_experts(out, result, x, values, indices, offsets, ends)
    return add_into(out, result, x, values, indices, offsets)


@bypass_product.register_fake
def _(result: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(result, memory_format=torch.contiguous_format)


@torch.library.custom_op("peft_ext::sparse_grad_values", mutates_args=())
def sparse_grad_values(
    grad: Tensor, x: Tensor, indices: Tensor, offsets: Tensor | None, transposed_entries: Tensor | None,
    transposed_offsets: Tensor | None, ends: Tensor | None, geometry: Sequence[int],
) -> Tensor:  # fmt: skip
    """`grad^T x` at the support only: `grad` `[tokens, rows]`, `x` `[tokens, fan_in]`; fp32 (or fp64)."""
    if geometry:
        tables = (transposed_entries, transposed_offsets)
        own = Entries.of(indices, offsets, *tables, geometry, grad.shape[1], x.shape[1])
        return values_gradient_of_convolution(grad, x, own).view(indices.shape)
    if ends is not None:
        return values_gradient_of_experts(grad, x, indices, offsets, ends)
    return values_gradient(grad, x, indices, offsets)


@sparse_grad_values.register_fake
def _(grad: Tensor, x: Tensor, indices: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty(indices.shape, dtype=accumulation_dtype(grad, x))


@torch.library.custom_op("peft_ext::sparse_grad_input", mutates_args=())
def sparse_grad_input(
    grad: Tensor, size: Sequence[int], dtype: torch.dtype, values: Tensor, indices: Tensor, offsets: Tensor | None,
    transposed_entries: Tensor | None, transposed_offsets: Tensor | None, ends: Tensor | None, geometry: Sequence[int],
) -> Tensor:  # fmt: skip
    """`S^T grad` through the transposed table, so without atomics: `[tokens, *size]` in `dtype`."""
    out = grad.new_empty((len(grad), *size), dtype=dtype)
    if geometry:
        tables = (transposed_entries, transposed_offsets)
        own = Entries.of(indices, offsets, *tables, geometry, grad.shape[1], size[0])
        return input_gradient_of_convolution(out, grad, values, own)
    if transposed_entries is None or transposed_offsets is None:
        experts = 1 if ends is None else len(ends)
        transposed_entries, transposed_offsets = Support(indices, size[0], offsets).transposed(experts)
    support = (values, indices, offsets, transposed_entries, transposed_offsets)
    if ends is not None:
        return input_gradient_of_experts(out, grad, *support, ends)
    return input_gradient_into(out, grad, *support)


@sparse_grad_input.register_fake
def _(grad: Tensor, size: Sequence[int], dtype: torch.dtype, *rest: Any) -> Tensor:
    return grad.new_empty((grad.shape[0], *size), dtype=dtype)


# ---------------------------------------------------------------------- derivatives


def _setup(ctx: Any, needed: Sequence[bool], inputs: Sequence[Any]) -> None:
    _, x, values, *update = inputs
    save(ctx, x if needed[2] else None, x.shape[1:], x.dtype, values, *update)


def _backward(ctx: Any, needed: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
    x, size, dtype, values, *update = saved(ctx)
    grad_x = call(sparse_grad_input, grad, size, dtype, values, *update) if needed[1] else None
    return grad, grad_x, _of_values(needed[2], grad, x, values, update), *(None,) * len(update)


def _backward_grad_input(ctx: Any, needed: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
    outer, _, _, values, *update = saved(ctx)
    grad_outer = call(bypass_product, torch.zeros_like(outer), grad, values, *update) if needed[0] else None
    return grad_outer, None, None, _of_values(needed[3], outer, grad, values, update), *(None,) * len(update)


def _backward_grad_values(ctx: Any, needed: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
    outer, x, *update = saved(ctx)
    grad_outer = call(bypass_product, torch.zeros_like(outer), x, grad, *update) if needed[0] else None
    grad_x = call(sparse_grad_input, outer, x.shape[1:], x.dtype, grad, *update) if needed[1] else None
    return grad_outer, grad_x, *(None,) * len(update)


def _of_values(needed: bool, grad: Tensor, x: Tensor, values: Tensor, update: Sequence[Any]) -> Tensor | None:
    return call(sparse_grad_values, grad, x, *update).to(values.dtype) if needed else None


register_derivative(bypass_product, _setup, _backward)
register_derivative(sparse_grad_input, save_inputs, _backward_grad_input)
register_derivative(sparse_grad_values, save_inputs, _backward_grad_values)

for _op, _activations in ((bypass_product, 2), (sparse_grad_input, 1), (sparse_grad_values, 0)):
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
    geometry: ConvGeometry | None = None,
) -> Tensor:
    """
    Add the sparse update to a base layer's output; differentiable in `result`, `x` and `values`.

    Args:
        result (`torch.Tensor`): `[..., rows]`; of a convolution `[samples, rows, *size]`, or one sample of it.
        x (`torch.Tensor`): `[..., fan_in]`, or `[samples, channels, *input size]`, the base layer's input; saved for
            backward as it is, in its dtype.
        values, indices, offsets: the support, see [`Support`]; that of experts is over the rows of all of them, that
            of a convolution is of the weight flattened to `[rows, fan_in]`.
        transposed_entries, transposed_offsets: from [`Support.transposed`], with the number of experts; of a
            convolution from [`entries_by_tap`].
        ends (`torch.Tensor`, *optional*): of experts, integer `[experts]`: where the tokens of each one end. `result`
            and `x` are then sorted by expert, and `rows` are one expert's. What lies behind the last end stays as it
            is.
        geometry ([`ConvGeometry`], *optional*): of a convolution.

    Returns:
        `torch.Tensor`: in the shape and dtype of `result`.
    """
    update = (values, indices, offsets, transposed_entries, transposed_offsets, ends)
    if geometry is None:
        outputs, inputs = result.reshape(-1, result.shape[-1]), x.reshape(-1, x.shape[-1])
        return call(bypass_product, outputs, inputs, *update, []).view(result.shape)
    if result.dim() == len(geometry.kernel) + 1:
        return call(bypass_product, result[None], x[None], *update, geometry.pack()).squeeze(0)
    return call(bypass_product, result, x, *update, geometry.pack())
