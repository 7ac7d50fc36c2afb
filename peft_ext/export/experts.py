"""Weights that transformers fuses from several tensors of a checkpoint: the layers of a mixture's experts."""

from __future__ import annotations

import re

from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from .checkpoint import Checkpoint
from .piece import Piece


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
        pieces.append(Piece(key, shape[0], first))
        first += shape[0]
    return pieces if first == rows else None


def _number(key: str) -> int:
    """The expert's number in a tensor's name."""
    found = re.findall(r"\.experts\.(\d+)\.|\.(\d+)\.", key)
    experts = [int(expert) for expert, _ in found if expert]
    return experts[-1] if experts else int(found[-1][1])
