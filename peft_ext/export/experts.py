"""Weights that transformers fuses from several tensors of a checkpoint: the layers of a mixture's experts."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from ..sparse.support import Support
from .adapter import Entries
from .checkpoint import Checkpoint


@dataclass(frozen=True)
class Piece:
    """Some neurons of a fused weight."""

    key: str  # the tensor of the checkpoint
    first_row: int  # the first of the weight's rows that it holds
    rows: int  # how many it holds
    of_expert: int | None = None  # of a tensor `[experts, fan_in, rows]`, the rows of one expert

    def within(self, support: Support) -> tuple[Tensor, Tensor]:
        """Which of a support's entries lie in the tensor (bool `[entries]`), and where in it when flattened."""
        row = support.row_of_entry()
        inside = (row >= self.first_row) & (row < self.first_row + self.rows)
        row, column = row[inside] - self.first_row, support.indices.reshape(-1).long()[inside]
        if self.of_expert is None:
            return inside, row * support.fan_in + column
        expert, row = row // self.of_expert, row % self.of_expert
        return inside, (expert * support.fan_in + column) * self.of_expert + row


def sources_of(converter: WeightConverter) -> list[str] | None:
    """
    The patterns of the tensors that a converter of transformers stacks by expert and joins row by row, in the order of
    their rows; `None` of a converter that does something else.
    """
    steps = converter.operations
    stacks = bool(steps) and isinstance(steps[0], MergeModulelist) and steps[0].dim == 0
    joins = len(steps) == 1 or (len(steps) == 2 and isinstance(steps[1], Concatenate) and steps[1].dim == 1)
    return list(converter.source_patterns) if stacks and joins else None


def pieces_of(checkpoint: Checkpoint, keys: list[tuple[int, str]], rows: int, fan_in: int) -> list[Piece] | None:
    """
    The tensors of a fused weight in the order of its rows, all experts' neurons one after the other. `keys`: per
    tensor, the number of its pattern and its name. `None` if the tensors do not make up a weight of this shape.
    """
    pieces, first = [], 0
    for _, key in sorted(keys, key=lambda item: (_number(item[1]), item[0])):
        shape = checkpoint.tensors[key].shape
        if len(shape) != 2 or shape[1] != fan_in:
            return None
        pieces.append(Piece(key, first, shape[0]))
        first += shape[0]
    return pieces if first == rows else None


def whole_bank(checkpoint: Checkpoint, key: str, rows: int, fan_in: int) -> list[list[Piece]]:
    """The ways in which a tensor with all experts may hold a weight: neurons as rows, or as columns."""
    shape = checkpoint.tensors[key].shape
    if len(shape) != 3 or shape[0] * shape[1] * shape[2] != rows * fan_in:
        return []
    natural = [[Piece(key, 0, rows)]] if shape[2] == fan_in else []
    return natural + ([[Piece(key, 0, rows, of_expert=shape[2])]] if shape[1] == fan_in else [])


def mismatch(checkpoint: Checkpoint, pieces: list[Piece], entries: Entries) -> str | None:
    """What differs between a fused weight and the one that entries were chosen for; see [`Support.mismatch`]."""
    values: Tensor | None = None
    for piece in pieces:
        inside, positions = piece.within(entries.support)
        tensor = checkpoint.read(piece.key)
        if values is None:
            values = tensor.new_zeros(entries.support.entries)
        values[inside] = tensor.view(-1)[positions]
    if values is None:
        return None
    # The values alone, as one neuron that has them all: fingerprints depend on their order, not on where they lie.
    alone = entries.fingerprint.clone()
    alone[:2] = torch.tensor([1, len(values)])
    return Support(torch.arange(len(values), dtype=torch.int32)[None], len(values)).mismatch(alone, values[None])


def _number(key: str) -> int:
    """The expert's number in a tensor's name."""
    found = re.findall(r"\.experts\.(\d+)\.|\.(\d+)\.", key)
    experts = [int(expert) for expert, _ in found if expert]
    return experts[-1] if experts else int(found[-1][1])
