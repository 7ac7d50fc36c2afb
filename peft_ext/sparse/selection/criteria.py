"""Criteria that rank entries, one small class each. A higher score is selected first."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


# Elements scored at once: bounds the transient memory of a selection whatever the weight, and keeps the passes over a
# chunk in the cache.
CHUNK_ELEMENTS = 2**20


# Dtypes that are ranked as they are; others as fp32.
RANKED = (torch.float32, torch.bfloat16, torch.float16)


class Criterion(ABC):
    """Scores for the entries of a weight, computed again on each pass, a few rows at a time."""

    @abstractmethod
    def chunks(self, module: str, weight: Tensor) -> Iterator[Tensor]:
        """
        Args:
            module (`str`): name of the module, for errors and seeds.
            weight (`torch.Tensor`): float `[rows, fan_in]`, any strides.

        Yields:
            `torch.Tensor`: scores `[some rows, fan_in]` in fp32, bf16 or fp16, all rows in order.

        Raises:
            `ValueError`: if the weight or the scores hold NaN or infinity.
        """


def _row_chunks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    rows, fan_in = weight.shape
    step = max(1, CHUNK_ELEMENTS // max(fan_in, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows)), weight[start : start + step]


def _magnitudes(module: str, what: str, values: Tensor) -> Tensor:
    """`|values|`, after making sure that all are finite: the largest of them is not, if one is not."""
    magnitudes = (values if values.dtype in RANKED else values.float()).abs()
    if magnitudes.numel() and not bool(magnitudes.amax().isfinite()):
        raise ValueError(
            f"The {what} of module '{module}' hold NaN or infinity, so no entries can be ranked. Repair the "
            f"checkpoint, or leave the module out with `exclude_modules=['{module}']`."
        )
    return magnitudes


class Magnitude(Criterion):
    """Largest |w| first, as in NeuroAda and PSN."""

    def chunks(self, module: str, weight: Tensor) -> Iterator[Tensor]:
        for _, part in _row_chunks(weight):
            yield _magnitudes(module, "weights", part)


class Reverse(Criterion):
    """Smallest |w| first: a control for experiments."""

    def chunks(self, module: str, weight: Tensor) -> Iterator[Tensor]:
        for _, part in _row_chunks(weight):
            yield _magnitudes(module, "weights", part).neg_()


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
            _magnitudes(module, "weights", part)
            yield torch.rand(part.shape, generator=generator).to(part.device)


class Scored(Criterion):
    """Largest |score| first, for scores computed beforehand, such as the gradient of a loss in GPS."""

    def __init__(self, scores: Mapping[str, Callable[[], Tensor]]) -> None:
        self.scores = scores

    def chunks(self, module: str, weight: Tensor) -> Iterator[Tensor]:
        score = self.scores[module]()
        for rows, part in _row_chunks(weight):
            _magnitudes(module, "weights", part)
            yield _magnitudes(module, "scores", score[rows].to(part.device))
