"""Selection by sorting plain Python numbers."""

from collections.abc import Mapping

import torch
from torch import Tensor

from peft_ext.sparse.support import Support, offsets_from_counts


def best_per_row(scores: Tensor, k: int) -> list[list[int]]:
    """Columns of the k largest scores of each row; among equals the lowest column first."""
    return [
        sorted(sorted(range(len(row)), key=lambda column, row=row: (-row[column], column))[:k])
        for row in scores.double().tolist()
    ]


def best_overall(scores: Mapping[str, Tensor], budget: int) -> dict[str, Support]:
    """The largest scores of all modules; among equals the earlier module, row, column first."""
    candidates = [
        (-score, number, row, column)
        for number, matrix in enumerate(scores.values())
        for row, line in enumerate(matrix.double().tolist())
        for column, score in enumerate(line)
    ]
    chosen = sorted(candidates)[:budget]
    supports = {}
    for number, (module, matrix) in enumerate(scores.items()):
        places = sorted((row, column) for _, other, row, column in chosen if other == number)
        counts = torch.zeros(matrix.shape[0], dtype=torch.int64)
        for row, _ in places:
            counts[row] += 1
        columns = torch.tensor([column for _, column in places], dtype=torch.int32)
        supports[module] = Support(columns, matrix.shape[1], offsets_from_counts(counts))
    return supports
