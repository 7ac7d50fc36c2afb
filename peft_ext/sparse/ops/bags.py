"""The bypass's three products on plain tensors, as embedding bags over transposed activations.

A bag sums, for one neuron, the rows of `x^T` at its k inputs. With one input per neuron a plain column gather saves
the transposes, which cost more than the products: value gradient of 1024 tokens, 1024→2816, k=1, 2 CPU threads: 2.3 ms
gathered, 5.8 ms as bags.
Sums are taken in fp32 (fp64 for fp64 tensors) whatever the dtype of the activations, a chunk of tokens at a time.
On a GPU the Triton kernels in `gpu` take over where they can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..support import ends_of_rows, row_of_entry
from . import gpu


# Tokens handled at once: bounds the transposed or gathered copies whatever the batch.
BAG_TOKENS = 4096
GATHER_TOKENS = 256
# A bag's inner loop runs over tokens; below this many, gathering every entry's input is faster (decoding).
FEW_TOKENS = 8


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that sums are taken in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _transposed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[tokens, n]` to contiguous `[n, tokens]` of `dtype`."""
    return x.t().to(dtype).contiguous()


def _bag(table: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Sum of the weighted rows of `table` (`[n, tokens]`) in each bag: `[bags, tokens]`."""
    return torch.embedding_bag(table, indices, offsets, False, 0, False, weights, True)[0]


def add_into(
    out: Tensor, result: Tensor, x: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None
) -> Tensor:
    """`result + S x`, written to `out`; see [`bypass`]."""
    dtype = accumulation_dtype(result, x, values)
    if indices.numel() == 0:
        return out.copy_(result)
    if gpu.usable(result, x, values):
        return gpu.kernels().add(result, x, values, indices, offsets, out)
    columns, weights = indices.reshape(-1), values.reshape(-1).to(dtype)
    one_each = offsets is None and indices.shape[1] == 1
    few = offsets is None and x.shape[0] <= FEW_TOKENS
    ends = None if one_each or few else ends_of_rows(indices, offsets)
    chunk = GATHER_TOKENS if ends is None else BAG_TOKENS
    for x_part, base, part in zip(x.split(chunk), result.split(chunk), out.split(chunk), strict=True):
        if one_each:
            delta = x_part.index_select(1, columns).to(dtype).mul_(weights)
        elif ends is None:
            delta = (x_part.index_select(1, columns).to(dtype) * weights).view(len(x_part), *indices.shape).sum(-1)
        else:
            delta = _bag(_transposed(x_part, dtype), columns, ends, weights).t()
        if part.dtype != dtype:
            part.copy_(delta.contiguous().add_(base))
        elif delta.is_contiguous():
            torch.add(base, delta, out=part)
        else:
            # Copies of one dtype are transposed in blocks, sums are not (1024 tokens, 4096 rows: 7.3 and 31.7 ms).
            part.copy_(delta).add_(base)
    return out


def values_gradient(grad: Tensor, x: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
    """`grad^T x` at the support only; see [`sparse_grad_values`]."""
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
    ends = ends_of_rows(indices, offsets)
    bag_of_entry = row_of_entry(indices, offsets).to(torch.int32)
    for grad_part, x_part in zip(grad.split(BAG_TOKENS), x.split(BAG_TOKENS), strict=True):
        total += torch.ops.aten._embedding_bag_per_sample_weights_backward(
            _transposed(grad_part, dtype), _transposed(x_part, dtype), columns, ends[:-1], bag_of_entry, 0, -1
        )
    return total.view(indices.shape)


def input_gradient_into(
    out: Tensor,
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    transposed_entries: Tensor,
    transposed_offsets: Tensor,
) -> Tensor:
    """`S^T grad`, written to `out`; see [`sparse_grad_input`]."""
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
            sums = _bag(_transposed(grad_part, accumulate), rows, transposed_offsets, weights).t()
            part.copy_(sums if part.dtype == accumulate else sums.contiguous())  # see `add_into`
    return out
