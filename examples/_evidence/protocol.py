"""
The protocol of a comparison, the same for every method:

1. Training, validation and test samples are fixed; a training set of n samples is the first n of the same 1,000.
2. A method's learning rate is the best of five, half a decade apart, by the mean accuracy on the validation parts of
   the search's data sets (ties: by loss), or by the mean loss alone, on a seed of its own. If the best is at an edge
   of the grid, one more is tried beyond it, up to three times; what is at an edge even then is marked in the table.
3. With that rate, every seed and every data set is trained once and evaluated on the test part. The seed decides the
   head's start and the order of the samples, which are the same for all methods, LoRA's start and our random entries.
4. Steps, batch size, schedule and head are the same, and the head's learning rate too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from _experiment.plan import Ledger
from _quickstart.search import Search, Trial, beyond, grid

from .methods import Method
from .runs import SEARCH_SEED, Run


Record = dict[str, Any]
Cell = tuple[str, int]  # method, training samples
Conduct = Callable[[Sequence[Run]], None]  # trains what is not in the ledger yet


@dataclass(frozen=True)
class Comparison:
    """
    Methods on one pretrained model.

    Attributes:
        name, title: of the table.
        model: see `pretrained.encoders.load`.
        methods: see `methods`; the first is what the others are compared with.
        data, search_data: see `pretrained.data.load`; rates are chosen on `search_data`, which are among `data`.
        steps: per number of training samples, the steps.
        batch_size, validation, test, image_size, pooling, dtype: see `runs.Run`.
        seeds: of the table.
        chosen_by: `"accuracy"` or `"loss"`: what the search compares on the validation parts.
        trials, widenings: learning rates per method, and at most so many more beyond the edges.
        lower: final runs take the rate so many places of the grid below the best: how much hangs on the choice?
    """

    name: str
    title: str
    model: str
    methods: tuple[str, ...]
    data: tuple[str, ...]
    search_data: tuple[str, ...]
    steps: dict[int, int]
    batch_size: int = 16
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    chosen_by: str = "loss"
    trials: int = 5
    widenings: int = 3
    lower: int = 0
    validation: int = 300
    test: int = 600
    image_size: int | None = None
    pooling: str | None = None
    dtype: str = "float32"

    @property
    def most_trials(self) -> int:
        return self.trials + self.widenings

    @property
    def cells(self) -> list[Cell]:
        return [(method, size) for size in self.steps for method in self.methods]

    def run(self, cell: Cell, data: str, learning_rate: float, seed: int) -> Run:
        method, size = cell
        return Run(
            self.model,
            data,
            method,
            size,
            self.steps[size],
            self.batch_size,
            learning_rate,
            seed,
            self.validation,
            self.test,
            self.image_size,
            self.pooling,
            self.dtype,
        )

    def trial_runs(self, cell: Cell, learning_rate: float) -> list[Run]:
        return [self.run(cell, data, learning_rate, SEARCH_SEED) for data in self.search_data]

    def final_runs(self, cell: Cell, learning_rate: float) -> list[Run]:
        return [self.run(cell, data, learning_rate, seed) for data in self.data for seed in self.seeds]

    def search(self, cell: Cell, ledger: Ledger) -> Search:
        """What the ledger's trials say: the grid, and what lies beyond it."""
        rates = grid(Method.parse(cell[0]).centre, self.trials)
        found = Search([self._trial(cell, rate, ledger) for rate in rates])
        for _ in range(self.widenings):
            rate = beyond(found)
            if rate is None or ledger.find(self.trial_runs(cell, rate)[0]) is None:
                break
            trials = [*found.trials, self._trial(cell, rate, ledger)]
            found = Search(sorted(trials, key=lambda trial: trial.learning_rate))
        return found

    def rate(self, found: Search) -> float:
        """Of the final runs."""
        return found.trials[max(0, found.trials.index(found.best) - self.lower)].learning_rate

    def _trial(self, cell: Cell, learning_rate: float, ledger: Ledger) -> Trial:
        results = [ledger[run]["validation_result"] for run in self.trial_runs(cell, learning_rate)]
        losses = [float("inf") if result["loss"] is None else result["loss"] for result in results]
        accuracy = fmean(result["accuracy"] for result in results) if self.chosen_by == "accuracy" else None
        return Trial(learning_rate, fmean(losses), accuracy)


def conduct(comparison: Comparison, ledger: Ledger, train: Conduct) -> dict[Cell, Search]:
    """Search, widen, and train the final runs; every method's search."""
    cells = comparison.cells
    grids = {cell: grid(Method.parse(cell[0]).centre, comparison.trials) for cell in cells}
    train([run for cell in cells for rate in grids[cell] for run in comparison.trial_runs(cell, rate)])
    searches = {cell: comparison.search(cell, ledger) for cell in cells}
    for _ in range(comparison.widenings):
        narrow = {cell: found for cell, found in searches.items() if len(found.trials) < comparison.most_trials}
        wider = {cell: rate for cell, found in narrow.items() if (rate := beyond(found)) is not None}
        train([run for cell, rate in wider.items() for run in comparison.trial_runs(cell, rate)])
        searches |= {cell: comparison.search(cell, ledger) for cell in wider}
    train(final_runs(comparison, searches))
    return searches


def final_runs(comparison: Comparison, searches: dict[Cell, Search]) -> list[Run]:
    """Seed by seed, so that an unfinished comparison has whole seeds."""
    runs = [run for cell, found in searches.items() for run in comparison.final_runs(cell, comparison.rate(found))]
    return sorted(runs, key=lambda run: run.seed)
