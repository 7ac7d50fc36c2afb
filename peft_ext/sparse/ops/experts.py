"""The bypass for experts: of rows sorted by expert, each is multiplied by its own expert's update.

An update of all experts is one support over their rows, the first expert's first. What an expert needs of it are
slices, so that experts without tokens cost nothing. On a GPU one launch of the Triton kernels in `gpu` serves all
experts where they can, without waiting for the loads to be known on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import gpu
from .bags import accumulation_dtype, add_into, input_gradient_into, values_gradient


@dataclass(frozen=True)
class _Expert:
    """The tokens of one expert, and where its entries lie among those of all."""

    tokens: slice
    entries: slice  # of the flattened values
    rows: slice  # of a table, or of a ragged support's offsets
    number: int


def _experts(ends: Tensor, indices: Tensor, offsets: Tensor | None) -> Iterator[_Expert]:
    """The experts that have tokens."""
    number = len(ends)
    rows = (len(indices) if offsets is None else len(offsets) - 1) // number
    if offsets is None:
        firsts = [expert * rows * indices.shape[1] for expert in range(number + 1)]
    else:
        firsts = offsets[::rows].tolist()
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            entries = slice(firsts[expert], firsts[expert + 1])
            yield _Expert(slice(start, end), entries, slice(expert * rows, (expert + 1) * rows), expert)
        start = max(start, end)


def _own(expert: _Expert, values: Tensor, offsets: Tensor | None) -> Tensor:
    """An expert's part of a tensor in the shape of the support."""
    return values[expert.rows] if offsets is None else values[expert.entries]


def _own_offsets(expert: _Expert, offsets: Tensor | None) -> Tensor | None:
    if offsets is None:
        return None
    return offsets[expert.rows.start : expert.rows.stop + 1] - expert.entries.start


def add_of_experts(
    out: Tensor, result: Tensor, x: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None, ends: Tensor
) -> Tensor:
    """[`add_into`] for experts, whose tokens end at `ends`; see [`bypass`]."""
    if indices.numel() and gpu.usable(result, x, values):
        return gpu.kernels().add(result, x, values, indices, offsets, out, ends.to(torch.int32))
    last = 0
    for expert in _experts(ends, indices, offsets):
        out[last : expert.tokens.start] = result[last : expert.tokens.start]
        last = expert.tokens.stop
        add_into(
            out[expert.tokens], result[expert.tokens], x[expert.tokens], _own(expert, values, offsets),
            _own(expert, indices, offsets), _own_offsets(expert, offsets),
        )  # fmt: skip
    out[last:] = result[last:]
    return out


def values_gradient_of_experts(
    grad: Tensor, x: Tensor, indices: Tensor, offsets: Tensor | None, ends: Tensor
) -> Tensor:
    """[`values_gradient`] for experts."""
    if indices.numel() and len(x) and gpu.usable(grad, x):
        kernels = gpu.kernels()
        return kernels.grad_values(grad, x, indices, kernels.rows_of(indices, offsets), ends.to(torch.int32))
    gradient = torch.zeros(indices.shape, dtype=accumulation_dtype(grad, x), device=x.device)
    for expert in _experts(ends, indices, offsets):
        own = values_gradient(
            grad[expert.tokens], x[expert.tokens], _own(expert, indices, offsets), _own_offsets(expert, offsets)
        )
        _own(expert, gradient, offsets).copy_(own)
    return gradient


def input_gradient_of_experts(
    out: Tensor, grad: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None, transposed_entries: Tensor,
    transposed_offsets: Tensor, ends: Tensor,
) -> Tensor:  # fmt: skip
    """[`input_gradient_into`] for experts."""
    if indices.numel() and gpu.usable(grad, values, out):
        kernels = gpu.kernels()
        tables = (kernels.rows_of(indices, offsets), transposed_entries, transposed_offsets)
        return kernels.grad_input(grad, values, indices, *tables, out, ends.to(torch.int32))
    last, fan_in = 0, out.shape[1]
    for expert in _experts(ends, indices, offsets):
        out[last : expert.tokens.start] = 0
        last = expert.tokens.stop
        columns = transposed_offsets[expert.number * fan_in : (expert.number + 1) * fan_in + 1]
        input_gradient_into(
            out[expert.tokens], grad[expert.tokens], _own(expert, values, offsets), _own(expert, indices, offsets),
            _own_offsets(expert, offsets), transposed_entries[expert.entries] - expert.entries.start,
            columns - expert.entries.start,
        )  # fmt: skip
    out[last:] = 0
    return out
