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

from ..support import ends_of_rows
from . import gpu
from .bags import accumulation_dtype, add_into, input_gradient_into, values_gradient


@dataclass(frozen=True)
class _Expert:
    """The tokens of one expert, and where its entries lie among those of all."""

    number: int
    tokens: slice
    part: slice  # of a tensor in the shape of the support
    entries: slice  # of the flattened values
    offsets: Tensor | None  # its own, of a ragged support


def _experts(ends: Tensor, indices: Tensor, offsets: Tensor | None) -> Iterator[_Expert]:
    """The experts that have tokens."""
    bounds = ends_of_rows(indices, offsets)
    rows = (len(bounds) - 1) // len(ends)
    firsts = bounds[::rows].tolist()
    start = 0
    for number, end in enumerate(ends.tolist()):
        if end > start:
            own, entries = slice(number * rows, (number + 1) * rows), slice(firsts[number], firsts[number + 1])
            own_offsets = None if offsets is None else offsets[own.start : own.stop + 1] - entries.start
            yield _Expert(number, slice(start, end), own if offsets is None else entries, entries, own_offsets)
        start = max(start, end)


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
            out[expert.tokens], result[expert.tokens], x[expert.tokens], values[expert.part], indices[expert.part],
            expert.offsets,
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
        gradient[expert.part] = values_gradient(
            grad[expert.tokens], x[expert.tokens], indices[expert.part], expert.offsets
        )
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
            out[expert.tokens], grad[expert.tokens], values[expert.part], indices[expert.part], expert.offsets,
            transposed_entries[expert.entries] - expert.entries.start, columns - expert.entries.start,
        )  # fmt: skip
    out[last:] = 0
    return out
