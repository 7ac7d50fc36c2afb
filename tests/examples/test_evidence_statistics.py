"""What the comparison of two methods says, and the search that precedes it."""

from __future__ import annotations

import numpy as np
import pytest
from _evidence.statistics import paired_difference
from _evidence.training import packed, unpacked
from _quickstart.search import Search, Trial, beyond


def draws(seed: int, accuracy: float, shape: tuple[int, int] = (5, 400)) -> np.ndarray:
    """Predictions that are right with a probability that differs between samples."""
    generator = np.random.default_rng(seed)
    return (generator.random(shape) < accuracy).astype(int)


def test_a_method_does_not_differ_from_itself():
    right = [draws(0, 0.7), draws(1, 0.8)]
    difference = paired_difference(right, right)
    assert (difference.mean, difference.low, difference.high) == (0, 0, 0)
    assert (difference.wins, difference.losses, difference.pairs) == (0, 0, 10)
    assert difference.verdict == "can't be told"


def test_a_difference_that_every_seed_and_sample_has_is_certain():
    worse = np.zeros((3, 50), dtype=int)
    difference = paired_difference([worse + 1], [worse])
    assert (difference.low, difference.high) == pytest.approx((1, 1)) and difference.verdict == "better"
    assert paired_difference([worse], [worse + 1]).verdict == "worse"


def test_data_sets_count_equally_whatever_their_size():
    small, large = np.ones((2, 10), dtype=int), np.zeros((2, 1000), dtype=int)
    assert paired_difference([small, large], [small * 0, large]).mean == 0.5


def test_the_interval_is_that_of_two_independent_samples():
    """Seeds that agree leave the samples' spread: p (1 - p) / n for each method."""
    a, b = (np.repeat(draws(seed, p, (1, 800)), 5, 0) for seed, p in ((0, 0.75), (1, 0.7)))
    difference = paired_difference([a], [b])
    expected = 1.96 * np.sqrt((0.75 * 0.25 + 0.7 * 0.3) / 800)
    assert (difference.high - difference.low) / 2 == pytest.approx(expected, rel=0.1)
    assert difference.low < difference.mean < difference.high


def test_seeds_that_disagree_widen_the_interval():
    a = np.vstack([np.ones((3, 400)), np.zeros((3, 400))]).astype(int)
    difference = paired_difference([a], [np.zeros_like(a)])
    assert (difference.wins, difference.pairs) == (3, 6)
    assert difference.high - difference.low > 0.6


@pytest.mark.parametrize("bits", [[True], [False, False, True], [False] * 9, [True, False] * 40])
def test_correct_samples_survive_the_file(bits):
    assert unpacked(packed(bits)) == bits


def test_a_search_goes_on_past_its_edge_and_nowhere_else():
    def found(*accuracies):
        rates = (0.001, 0.0032, 0.01)
        return Search([Trial(rate, 1.0, accuracy) for rate, accuracy in zip(rates, accuracies, strict=True)])

    assert beyond(found(0.1, 0.3, 0.2)) is None
    assert beyond(found(0.3, 0.2, 0.1)) == 0.00032
    assert beyond(found(0.1, 0.2, 0.3)) == 0.032
