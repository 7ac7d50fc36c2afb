"""Where neurons of a weight lie in a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..sparse.support import Support


@dataclass(frozen=True)
class Piece:
    """Some neurons of a weight, in one tensor of a checkpoint."""

    key: str  # the tensor
    rows: int  # how many neurons it holds
    first_row: int = 0  # the weight's row that it begins with; below zero where other weights lie before this one
    of_block: int | None = None  # of a tensor `[blocks, fan_in, rows]`, whose columns are neurons, the rows of a block

    def within(self, support: Support) -> tuple[Tensor, Tensor]:
        """Which of a support's entries lie in the tensor (bool `[entries]`), and where in it when flattened."""
        row = support.row_of_entry()
        inside = (row >= self.first_row) & (row < self.first_row + self.rows)
        row, column = row[inside] - self.first_row, support.indices.reshape(-1).long()[inside]
        if self.of_block is None:
            return inside, row * support.fan_in + column
        block, row = row // self.of_block, row % self.of_block
        return inside, (block * support.fan_in + column) * self.of_block + row


def in_one_tensor(key: str, shape: tuple[int, ...], rows: int, fan_in: int) -> list[Piece]:
    """
    The ways in which a tensor may hold a weight, all experts' neurons one after the other: as rows, or as columns, as
    transformers' `Conv1D` keeps them.
    """
    if torch.Size(shape).numel() != rows * fan_in:
        return []
    as_rows = shape[0] == rows or (len(shape) == 3 and shape[2] == fan_in)
    as_columns = len(shape) in (2, 3) and shape[-2] == fan_in and (shape[-1] > 1 or not as_rows)
    return [Piece(key, rows)] * as_rows + [Piece(key, rows, of_block=shape[-1])] * as_columns


def values_at(pieces: list[Piece], support: Support, read: Callable[[str], Tensor]) -> Tensor:
    """
    A weight's values at the entries of a support, `[entries]`, from its tensors in the order of their rows.

    Raises:
        `ValueError`: if a tensor is no floating-point one of 16 bits or more.
    """
    values = []
    for piece in pieces:
        tensor = read(piece.key)
        if not tensor.is_floating_point() or tensor.element_size() == 1:
            raise ValueError(f"'{piece.key}' is stored as {tensor.dtype}, too coarse to hold an update.")
        values.append(tensor.view(-1)[piece.within(support)[1]])
    return torch.cat(values)
