"""The bypass path: `result + S(values) x` at a cost that follows entries × tokens, on any base layer.

The three products are embedding bags over transposed activations: a bag sums, for one neuron, the rows of `x^T` at its
k inputs. With one input per neuron a plain column gather saves the transposes, which cost more than the products:
value gradient of 1024 tokens, 1024→2816, k=1, 2 CPU threads: 2.3 ms gathered, 5.8 ms as bags.
Sums are taken in fp32 (fp64 for fp64 tensors) whatever the dtype of the activations, a chunk of tokens at a time.
On a GPU the Triton kernels in `gpu` take over where they can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..support import Support, row_of_entry
from . import gpu
from .batching import vmap_rule
from .derivatives import call, register_derivative


# Tokens handled at once: bounds the transposed or gathered copies whatever the batch.
BAG_TOKENS = 4096
GATHER_TOKENS = 256
# A bag's inner loop runs over tokens; below this many, gathering every entry's input is faster (decoding).
FEW_TOKENS = 8


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that sums are taken in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _bag_offsets(indices: Tensor, offsets: Tensor | None) -> Tensor:
    """int32 `[rows + 1]`: where each neuron's entries start and end."""
    if offsets is not None:
        return offsets
    rows, k = indices.shape
    return torch.arange(rows + 1, dtype=torch.int32, device=indices.device) * k


def _transposed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[tokens, n]` to contiguous `[n, tokens]` of `dtype`."""
    return x.t().to(dtype).contiguous()


def _bag(table: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Sum of the weighted rows of `table` (`[n, tokens]`) in each bag: `[bags, tokens]`."""
    return torch.embedding_bag(table, indices, offsets, False, 0, False, weights, True)[0]


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


def add_into(
    out: Tensor, result: Tensor, x: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None
) -> Tensor:
    """[`sparse_add`] that writes to `out`, without an operator around it."""
    dtype = accumulation_dtype(result, x, values)
    if indices.numel() == 0:
        return out.copy_(result)
    if gpu.usable(result, x, values):
        return gpu.kernels().add(result, x, values, indices, offsets, out)
    columns, weights = indices.reshape(-1), values.reshape(-1).to(dtype)
    one_each = offsets is None and indices.shape[1] == 1
    few = offsets is None and x.shape[0] <= FEW_TOKENS
    ends = None if one_each or few else _bag_offsets(indices, offsets)
    chunk = GATHER_TOKENS if ends is None else BAG_TOKENS
    for x_part, base, part in zip(x.split(chunk), result.split(chunk), out.split(chunk), strict=True):
        if one_each:
            delta = x_part.index_select(1, columns).to(dtype).mul_(weights)
        elif ends is None:
            delta = (x_part.index_select(1, columns).to(dtype) * weights).view(len(x_part), *indices.shape).sum(-1)
        else:
            delta = _bag(_transposed(x_part, dtype), columns, ends, weights).t()
        if part.dtype == dtype:
            torch.add(base, delta, out=part)
        else:
            part.copy_(base + delta)
    return out


@sparse_add.register_fake
def _(result: Tensor, x: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
    return torch.empty_like(result, memory_format=torch.contiguous_format)


@torch.library.custom_op("peft_ext::sparse_grad_values", mutates_args=())
def sparse_grad_values(grad: Tensor, x: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
    """`grad^T x` at the support only: `grad` `[tokens, rows]`, `x` `[tokens, fan_in]`; fp32 (or fp64)."""
    return values_gradient(grad, x, indices, offsets)


def values_gradient(grad: Tensor, x: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
    """[`sparse_grad_values`] without an operator around it."""
    dtype = accumulation_dtype(grad, x)
    if indices.numel() == 0 or x.shape[0] == 0:
        return torch.zeros(indices.shape, dtype=dtype, device=x.device)
    if gpu.usable(grad, x):
        kernels = gpu.kernels()
        return kernels.grad_values(grad, x, indices, kernels.rows_of(indices, offsets))
    columns = indices.reshape(-1)
    one_each = offsets is None and indices.shape[1] == 1
    if x.shape[0] <= (GATHER_TOKENS if one_each else FEW_TOKENS):
        seen = x.index_select(1, columns).to(dtype)
        if one_each:
            return (seen * grad).sum(0).view(indices.shape)
        if offsets is None:
            return (seen.view(-1, *indices.shape) * grad.to(dtype)[..., None]).sum(0)
        return seen.mul_(grad.index_select(1, row_of_entry(indices, offsets))).sum(0)
    if one_each:
        wanted = columns.long().expand(GATHER_TOKENS, -1)
        sums = torch.zeros(wanted.shape, dtype=dtype, device=x.device)  # summed over tokens only once, at the end
        for grad_part, x_part in zip(grad.split(GATHER_TOKENS), x.split(GATHER_TOKENS), strict=True):
            here = len(x_part)
            sums[:here].addcmul_(x_part.gather(1, wanted[:here]).to(dtype), grad_part.to(dtype))
        return sums.sum(0).view(indices.shape)
    total = torch.zeros(indices.numel(), dtype=dtype, device=x.device)
    ends = _bag_offsets(indices, offsets)
    bag_of_entry = row_of_entry(indices, offsets).to(torch.int32)
    for grad_part, x_part in zip(grad.split(BAG_TOKENS), x.split(BAG_TOKENS), strict=True):
        total += torch.ops.aten._embedding_bag_per_sample_weights_backward(
            _transposed(grad_part, dtype), _transposed(x_part, dtype), columns, ends[:-1], bag_of_entry, 0, -1
        )
    return total.view(indices.shape)


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


def input_gradient_into(
    out: Tensor,
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    transposed_entries: Tensor,
    transposed_offsets: Tensor,
) -> Tensor:
    """[`sparse_grad_input`] that writes to `out`, without an operator around it."""
    accumulate = accumulation_dtype(grad, values)
    if indices.numel() == 0:
        return out.zero_()
    if gpu.usable(grad, values, out):
        kernels = gpu.kernels()
        rows = kernels.rows_of(indices, offsets)
        return kernels.grad_input(grad, values, indices, rows, transposed_entries, transposed_offsets, out)
    entries = transposed_entries.long()
    rows = row_of_entry(indices, offsets).to(torch.int32)[entries]
    weights = values.reshape(-1).to(accumulate)[entries]
    for part, grad_part in zip(out.split(BAG_TOKENS), grad.split(BAG_TOKENS), strict=True):
        if len(part):
            part.copy_(_bag(_transposed(grad_part, accumulate), rows, transposed_offsets, weights).t())
    return out


@sparse_grad_input.register_fake
def _(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    transposed_entries: Tensor,
    transposed_offsets: Tensor,
    dtype: torch.dtype,
) -> Tensor:
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


@bypass_linear.register_fake
def _(
    result: Tensor,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    transposed_entries: Tensor,
    transposed_offsets: Tensor,
) -> Tensor:
    return torch.empty_like(result, memory_format=torch.contiguous_format)


# ---------------------------------------------------------------------- derivatives


def _setup_context(ctx, needed, inputs) -> None:  # type: ignore[no-untyped-def]
    _, x, values, *support = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(x if needed[2] else None, values, *support)


def _backward(ctx, needed, grad: Tensor):  # type: ignore[no-untyped-def]
    x, values, *support = ctx.saved_tensors
    grad_x = grad_values = None
    if needed[1]:
        grad_x = call(sparse_grad_input, grad, values, *support, ctx.x_dtype)
    if needed[2]:
        grad_values = call(sparse_grad_values, grad, x, *support[:2]).to(values.dtype)
    return grad, grad_x, grad_values, None, None, None, None


def _setup_grad_values(ctx, needed, inputs) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward_grad_values(ctx, needed, grad: Tensor):  # type: ignore[no-untyped-def]
    outer, x, *support = ctx.saved_tensors
    support += Support(support[0], x.shape[-1], support[1]).transposed()
    grad_outer = grad_x = None
    if needed[0]:
        grad_outer = call(bypass_linear, torch.zeros_like(outer), x, grad, *support)
    if needed[1]:
        grad_x = call(sparse_grad_input, outer, grad, *support, x.dtype)
    return grad_outer, grad_x, None, None


def _setup_grad_input(ctx, needed, inputs) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:-1])


def _backward_grad_input(ctx, needed, grad: Tensor):  # type: ignore[no-untyped-def]
    outer, values, *support = ctx.saved_tensors
    grad_outer = grad_values = None
    if needed[0]:
        grad_outer = call(bypass_linear, torch.zeros_like(outer), grad, values, *support)
    if needed[1]:
        grad_values = call(sparse_grad_values, outer, grad, *support[:2]).to(values.dtype)
    return grad_outer, grad_values, *(None,) * 5


register_derivative(bypass_linear, _setup_context, _backward)
register_derivative(sparse_grad_values, _setup_grad_values, _backward_grad_values)
register_derivative(sparse_grad_input, _setup_grad_input, _backward_grad_input)

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
