"""The learning-rate search: the same number of trials on the same spacing for every method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


SPACING = 10**0.5  # two trials per decade


@dataclass(frozen=True)
class Trial:
    """One learning rate and what it reached on the validation split."""

    learning_rate: float
    loss: float
    accuracy: float | None = None

    def rank(self) -> tuple[float, float]:
        """Higher is better: accuracy where there is one, then the loss, since accuracies of small splits tie."""
        loss = self.loss if math.isfinite(self.loss) else math.inf
        return (self.accuracy if self.accuracy is not None else 0.0, -loss)


@dataclass(frozen=True)
class Search:
    """The trials of one method in rising order of the learning rate."""

    trials: list[Trial]

    @property
    def best(self) -> Trial:
        return max(self.trials, key=Trial.rank)

    @property
    def edge(self) -> str | None:
        """`"lower"` or `"upper"` if the best trial is the first or last of the grid: a wider one might do better."""
        position = self.trials.index(self.best)
        if len(self.trials) > 1 and position in (0, len(self.trials) - 1):
            return "upper" if position else "lower"
        return None


def grid(centre: float, trials: int) -> list[float]:
    """`trials` learning rates around `centre`, two significant digits each."""
    if trials < 1:
        raise ValueError(f"trials={trials}: a search needs at least one trial")
    return [float(f"{centre * SPACING ** (step - trials // 2):.2g}") for step in range(trials)]


def beyond(search: Search) -> float | None:
    """The learning rate that continues the grid past its best one, if that one is at an edge."""
    if search.edge is None:
        return None
    factor = SPACING if search.edge == "upper" else 1 / SPACING
    return float(f"{search.best.learning_rate * factor:.2g}")


def search(centre: float, trials: int, run: Callable[[float], Trial]) -> Search:
    """Run every learning rate of the grid once."""
    return Search([run(learning_rate) for learning_rate in grid(centre, trials)])
