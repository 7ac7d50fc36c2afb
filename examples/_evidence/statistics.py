"""Means, paired differences and their bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


RESAMPLES = 4000
LEVEL = 0.95
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Difference:
    """
    A minus B.

    Attributes:
        mean: over data sets, seeds and test samples.
        low, high: ends of the interval of `LEVEL`.
        wins, losses, pairs: of the pairs of one data set and one seed, those where A is ahead, where B is, and all.
    """

    mean: float
    low: float
    high: float
    wins: int
    losses: int
    pairs: int

    @property
    def verdict(self) -> str:
        """`"better"`, `"worse"`, or `"can't be told"` where the interval holds 0."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "can't be told"


def paired_difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> Difference:
    """
    Compare two methods on the same data, seeds and test samples.

    The interval is a percentile bootstrap that draws seeds and test samples again, with replacement and independently,
    within every data set: it covers what another order and head, and other test samples of the same kind would change.
    The data sets and the training samples are what they are.

    Args:
        a, b (`Sequence[np.ndarray]`): per data set, `[seeds, samples]`, 1 where the prediction is right, else 0.
    """
    differences = [one.astype(float) - other for one, other in zip(a, b, strict=True)]
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    draws = np.zeros(RESAMPLES)
    for difference in differences:
        seeds, samples = difference.shape
        seed_weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
        sample_weights = generator.multinomial(samples, np.full(samples, 1 / samples), RESAMPLES) / samples
        draws += ((seed_weights @ difference) * sample_weights).sum(1)  # [resamples]
    low, high = np.quantile(draws / len(differences), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    pairs = np.concatenate([difference.mean(1) for difference in differences])
    return Difference(
        mean=float(np.mean([difference.mean() for difference in differences])),
        low=float(low),
        high=float(high),
        wins=int((pairs > 0).sum()),
        losses=int((pairs < 0).sum()),
        pairs=len(pairs),
    )
