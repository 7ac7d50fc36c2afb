"""Which trainings an experiment consists of: a search of learning rates on one seed, then the chosen on others."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _benches.base import Bench
from _benches.runs import Run


METHODS = ["joint", "pcgrad", "cagrad", "mgda", "imtl_g", "nash_mtl", "famo"]
RATES = [3e-3, 1e-3]
# Training images and epochs, so that all of it takes about an hour of one core. With 750 pairs of digits, training
# goes on well after the training set is learned.
BUDGETS = {"digits": (750, 40), "sprites": (1000, 15), "scenes": (200, 10)}
Record = dict[str, Any]  # a finished run: its settings, metrics and conflicts
Cell = tuple[str, str, str | None]  # method, mask, task if trained alone


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        bench: the problem.
        methods, masks, rates: what is compared, and the learning rates that each may have.
        seeds: paired: data, start and order of the samples are the same for all methods and masks.
        search_seed: of the search, none of `seeds`.
        density, epochs, images, search_epochs: of a training.
    """

    bench: Bench
    methods: list[str]
    masks: list[str]
    rates: list[float]
    seeds: list[int]
    search_seed: int
    density: float
    epochs: int
    images: int
    search_epochs: int

    def settings(self) -> Record:
        """All but the problem, for a file."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "bench"}

    @property
    def cells(self) -> list[Cell]:
        """Single tasks first: the others are measured against them."""
        alone: list[Cell] = [("joint", "full", task) for task in self.bench.tasks]
        return alone + [(method, mask, None) for method in self.methods for mask in self.masks]

    def _run(self, cell: Cell, rate: float, seed: int, epochs: int) -> Run:
        method, mask, task = cell
        return Run(self.bench.name, method, mask, rate, seed, self.density, task, epochs, self.images)

    def search(self) -> list[Run]:
        """Every cell with every rate, on the search's seed."""
        return [self.trial(cell, rate) for cell in self.cells for rate in self.rates]

    def trial(self, cell: Cell, rate: float) -> Run:
        """A cell with one rate, on the search's seed."""
        return self._run(cell, rate, self.search_seed, self.search_epochs)

    def final(self, rates: dict[Cell, float]) -> list[Run]:
        """Every cell with its rate, seed by seed, so that an unfinished experiment has whole seeds."""
        return [self._run(cell, rates[cell], seed, self.epochs) for seed in self.seeds for cell in self.cells]


class Ledger:
    """
    Finished runs, a line of JSON each, in a file that grows.

    Args:
        path (`Path`): the file; a last line that was cut off is dropped.
        run_type (`type`, *optional*): dataclass of the settings by which a run is found.
    """

    def __init__(self, path: Path, run_type: Any = Run) -> None:
        self.path = path
        self.names = list(run_type.__dataclass_fields__)
        text = path.read_text() if path.exists() else ""
        if text and not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
            path.write_text(text)
        self.records: list[Record] = [json.loads(line) for line in text.splitlines()]
        self._found = {self._key(record): record for record in self.records}

    def _key(self, settings: Record) -> str:
        return json.dumps([settings[name] for name in self.names])

    def find(self, run: Any) -> Record | None:
        return self._found.get(self._key(asdict(run)))

    def __getitem__(self, run: Any) -> Record:
        return self._found[self._key(asdict(run))]

    def add(self, record: Record) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.records.append(record)
        self._found[self._key(record)] = record


def settings_of(plan: Plan, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the report says about a problem's trainings."""
    return {
        "tasks": plan.bench.tasks,
        "images": plan.images,
        "epochs": plan.epochs,
        "search_epochs": plan.search_epochs,
        "batch_size": plan.bench.batch_size,
        "density": plan.density,
        "rates": plan.rates,
        "seeds": sorted({run["seed"] for run in runs} - {plan.search_seed}),
        "search_seed": plan.search_seed,
    }
