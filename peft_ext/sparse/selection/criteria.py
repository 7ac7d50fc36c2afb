"""What entries are ranked by: one small class per criterion. A higher score is chosen first."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


# Elements scored at once: bounds the transient memory of a selection whatever the weight.
CHUNK_ELEMENTS = 2**22


class Criterion(ABC):
    """Scores for the entries of a weight, computed again on each pass, a few rows at a time."""

    @abstractmethod
    def chunks(self, module: str, weight: Tensor) -> Iterator[Tensor]:
        """
        Args:
            module (`str`): name of the module, for errors and seeds.
            weight (`torch.Tensor`): float `[rows, fan_in]`, any strides.

        Yields:
            `torch.Tensor`: fp32 scores `[some rows, fan_in]`, all rows in order.

        Raises:
            `ValueError`: if the weight or the scores hold NaN or infinity.
        """


def _row_chunks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    rows, fan_in = weight.shape
    step = max(1, CHUNK_ELEMENTS // max(fan_in, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows)), weight[start : start + step]


def _finite(module: str, what: str, values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"The {what} of module '{module}' hold NaN or infinity, so no entries can be ranked. Repair the "
            f"checkpoint, or leave the module out with `exclude_modules=['{module}']`."
        )
    return values


class Magnitude(Criterion):
    """Largest |w| first (thesis eq. 5.2)."""

    def chunks(self, module: str, weight: Tensor) -> Iterator[Tensor]:
        for _, part in _row_chunks(weight):
            yield _finite(module, "weights", part).float().abs()


class Reverse(Criterion):
    """Smallest |w| first (thesis section 5.4, lowest magnitude)."""

    def chunks(self, module: str, weight: Tensor) -> Iterator[Tensor]:
        for _, part in _row_chunks(weight):
            yield -_finite(module, "weights", part).float().abs()


class Random(Criterion):
    """Uniform order, drawn on the CPU from the seed and the module's name: the same on every device."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def generator(self, module: str) -> torch.Generator:
        """Its own stream for each seed and module. (torch uses the low 32 bits of a seed, so both go into a hash.)"""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {module}".encode()))

    def chunks(self, module: str, weight: Tensor) -> Iterator[Tensor]:
        generator = self.generator(module)
        for _, part in _row_chunks(weight):
            _finite(module, "weights", part)
            yield torch.rand(part.shape, generator=generator).to(part.device)


class Scored(Criterion):
    """Largest |score| first, for scores computed beforehand, such as a loss's gradient (thesis section 4.3.1)."""

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        self.scores = scores

    def chunks(self, module: str, weight: Tensor) -> Iterator[Tensor]:
        score = self.scores[module]
        for rows, part in _row_chunks(weight):
            _finite(module, "weights", part)
            yield _finite(module, "scores", score[rows].to(part.device)).float().abs()
