"""What finished runs say: the best learning rates, a table's rows, and paired differences."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from _benches.base import Bench

from peft_ext.mtl import relative_task_drop

from .plan import Cell, Record


def drop(bench: Bench, metrics: Any, baseline: Any) -> float:
    """Δm in percent, flat over all metrics."""
    return relative_task_drop(metrics, baseline, bench.higher_is_better)


def choose_rates(bench: Bench, records: Iterable[Record]) -> dict[Cell, float]:
    """
    Per cell the learning rate with the lowest Δm on validation data: of a single task against the same task at the
    first rate, of several tasks against single tasks at their chosen rates.
    """
    by_cell: dict[Cell, dict[float, Any]] = {}
    for record in records:
        cell = (record["method"], record["mask"], record["task"])
        by_cell.setdefault(cell, {})[record["learning_rate"]] = record["validation"]
    alone = {cell: rates for cell, rates in by_cell.items() if cell[2] is not None}
    chosen: dict[Cell, float] = {}
    baseline: dict[str, Any] = {}
    for cell, metrics in alone.items():
        first = next(iter(metrics.values()))
        chosen[cell] = min(metrics, key=lambda rate: drop(bench, metrics[rate], first))
        baseline |= metrics[chosen[cell]]
    for cell, metrics in by_cell.items():
        if cell[2] is None:
            chosen[cell] = min(metrics, key=lambda rate: drop(bench, metrics[rate], baseline))
    return chosen


def rows_of(bench: Bench, records: Iterable[Record]) -> list[Record]:
    """One row per method and mask of the final runs: each seed's conflicts and Δm on test data."""
    records = list(records)
    alone: dict[int, Any] = {}
    for record in records:
        if record["task"] is not None:
            alone.setdefault(record["seed"], {}).update(record["test"])
    by_cell: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record["task"] is None and len(alone.get(record["seed"], {})) == len(bench.tasks):
            by_cell.setdefault((record["method"], record["mask"]), []).append(record)
    rows = []
    for (method, mask), cell in by_cell.items():
        row: Record = {"bench": bench.name, "method": method, "mask": mask}
        row["learning_rate"] = cell[0]["learning_rate"]
        row["seeds"] = [record["seed"] for record in cell]
        for name in ("incidence_all", "incidence_last_half", "noise_floor"):
            row[name] = [record.get(f"gradient_conflict_{name}") for record in cell]
        row["task_drop"] = [drop(bench, record["test"], alone[record["seed"]]) for record in cell]
        rows.append(row)
    return rows


MEASURES = ("incidence_all", "incidence_last_half", "task_drop")


def differences_of(rows: list[Record]) -> list[Record]:
    """Sparse minus full, seed by seed, for every method and sparse mask."""
    found = {(row["bench"], row["method"], row["mask"]): row for row in rows}
    differences = []
    for (bench, method, mask), row in found.items():
        full = found.get((bench, method, "full"))
        if mask == "full" or full is None:
            continue
        seeds = [seed for seed in row["seeds"] if seed in full["seeds"]]
        difference: Record = {"bench": bench, "method": method, "mask": mask, "seeds": seeds}
        for name in MEASURES:
            ours, theirs = (dict(zip(one["seeds"], one[name], strict=True)) for one in (row, full))
            difference[name] = [ours[seed] - theirs[seed] for seed in seeds]
        differences.append(difference)
    return differences


def summaries_of(differences: list[Record]) -> list[Record]:
    """The differences of each bench and mask over methods: the mean per seed, and how many of all runs are lower."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for difference in differences:
        groups.setdefault((difference["bench"], difference["mask"]), []).append(difference)
    summaries = []
    for (bench, mask), group in groups.items():
        seeds = [seed for seed in group[0]["seeds"] if all(seed in one["seeds"] for one in group)]
        summary: Record = {"bench": bench, "mask": mask, "methods": len(group), "seeds": seeds}
        for name in MEASURES:
            values = np.array([[one[name][one["seeds"].index(seed)] for seed in seeds] for one in group])
            summary[name] = values.mean(axis=0).tolist()  # per seed
            summary[f"{name}_lower"] = int((values < 0).sum())
        summaries.append(summary)
    return summaries
