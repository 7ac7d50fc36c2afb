"""Figures of gradient conflicts, from the JSON lines of one or several runs. Each comes with its data."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from ...extras import needs
from ...io import write_atomically
from .recorder import conflict_incidence, mean_of_known


def read_conflicts(path: str) -> dict[str, Any]:
    """
    Read a file of JSON lines that [`MTLTrainer`] or [`GradientConflictCallback`] wrote.

    Returns:
        `dict`: `tasks`, `pairs` (lists of names); `step`, `epoch` (arrays `[steps]`); `cos` (`[steps, pairs]`, NaN
        where undefined); `weights` (`[steps, tasks]` or `None`); `layers` (dict of `[steps, pairs]`).
    """
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.strip()]
    if not lines:
        raise ValueError(f"{path} has no recorded step.")

    def column(key: str) -> np.ndarray[Any, Any]:
        return np.array([line[key] for line in lines], dtype=np.float64)

    tasks = lines[0]["tasks"]
    names = sorted({name for line in lines for name in line.get("layers", {})})
    empty = [None] * len(lines[0]["cos"])
    return {
        "tasks": tasks,
        "pairs": [f"{a} × {b}" for a, b in combinations(tasks, 2)],
        "step": column("step"),
        "epoch": column("epoch"),
        "cos": column("cos"),
        "weights": column("weights") if all("weights" in line for line in lines) else None,
        "layers": {
            name: np.array([line.get("layers", {}).get(name, empty) for line in lines], dtype=np.float64)
            for name in names
        },
    }


def incidence_per_epoch(run: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """Epochs, from 1, and the incidence (percent) over the steps of each."""
    epochs = np.floor(run["epoch"]).astype(int)
    numbers = sorted(set(epochs.tolist()))
    return [n + 1 for n in numbers], [conflict_incidence(run["cos"][epochs == n]) for n in numbers]


def last_half(run: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """The cosines of the second half of the steps, `[steps, pairs]`."""
    return run["cos"][2 * run["step"] > run["step"][-1]]


def plot_incidence(runs: Mapping[str, Mapping[str, Any]], path: str) -> None:
    """Incidence per epoch, one line per run."""
    data = {name: incidence_per_epoch(run) for name, run in runs.items()}
    figure, axes = _figure()
    for name, (epochs, values) in data.items():
        axes.plot(epochs, values, marker="o", markersize=3, label=name)
    axes.set(xlabel="epoch", ylabel="gradient conflicts (% of pairs)")
    axes.legend()
    _save(figure, path, {name: {"epoch": e, "incidence": v} for name, (e, v) in data.items()})


def plot_bars(runs: Mapping[str, Mapping[str, Any]], path: str, floor: float | None = None) -> None:
    """Incidence over all steps and the last half, one pair of bars per run (as figure 6.1); `floor`: noise."""
    data = {name: [conflict_incidence(run["cos"]), conflict_incidence(last_half(run))] for name, run in runs.items()}
    figure, axes = _figure()
    places = np.arange(len(data))
    for i, label in enumerate(("all steps", "last 50 %")):
        axes.bar(places + 0.4 * i - 0.2, [values[i] for values in data.values()], 0.38, label=label)
    if floor is not None:
        axes.axhline(floor, color="black", linestyle=":", label="noise floor")
    axes.set_xticks(places, list(data), rotation=30, ha="right")
    axes.set_ylabel("gradient conflicts (% of pairs)")
    axes.legend()
    _save(figure, path, {"runs": {n: {"all": v[0], "last_half": v[1]} for n, v in data.items()}, "floor": floor})


def plot_cosines(run: Mapping[str, Any], path: str) -> None:
    """Mean cosine between tasks as a heat map."""
    tasks = run["tasks"]
    matrix = np.eye(len(tasks))
    for (i, j), column in zip(combinations(range(len(tasks)), 2), run["cos"].T, strict=True):
        matrix[i, j] = matrix[j, i] = mean_of_known(column)
    figure, axes = _figure()
    image = axes.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu")
    axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    axes.set_yticks(range(len(tasks)), tasks)
    for i in range(len(tasks)):
        for j in range(len(tasks)):
            axes.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center")
    figure.colorbar(image, label="mean cosine")
    _save(figure, path, {"tasks": tasks, "mean_cos": matrix.tolist()})


def plot_angles(run: Mapping[str, Any], path: str, bins: int = 36) -> None:
    """Histogram of the angles between gradients, per pair; beyond 90° they conflict."""
    edges = np.linspace(0, 180, bins + 1)
    counts = {}
    figure, axes = _figure()
    for pair, column in zip(run["pairs"], run["cos"].T, strict=True):
        angles = np.degrees(np.arccos(column[~np.isnan(column)]))
        counts[pair] = np.histogram(angles, edges)[0]
        axes.stairs(counts[pair], edges, label=pair)
    axes.axvline(90, color="black", linestyle=":")
    axes.set(xlabel="angle between gradients (degrees)", ylabel="steps")
    axes.legend()
    _save(figure, path, {"edges": edges.tolist(), "counts": {pair: c.tolist() for pair, c in counts.items()}})


def plot_layers(run: Mapping[str, Any], path: str, parts: int = 20) -> None:
    """Incidence per layer (rows) over training (columns), a heat map."""
    if not run["layers"]:
        raise ValueError("The run has no layers; record it with conflict_granularity='layer'.")
    blocks = np.array_split(np.arange(len(run["step"])), min(parts, len(run["step"])))
    values = [[conflict_incidence(cosines[block]) for block in blocks] for cosines in run["layers"].values()]
    figure, axes = _figure(height=0.25 * len(values) + 1.5)
    image = axes.imshow(values, aspect="auto", vmin=0, vmax=100, cmap="magma")
    axes.set_yticks(range(len(values)), list(run["layers"]))
    axes.set_xticks(range(len(blocks)), [str(int(run["step"][block[-1]])) for block in blocks], rotation=90)
    axes.set_xlabel("up to step")
    figure.colorbar(image, label="gradient conflicts (% of pairs)")
    steps = [int(run["step"][block[-1]]) for block in blocks]
    _save(figure, path, {"layers": list(run["layers"]), "up_to_step": steps, "incidence": values})


def _figure(height: float = 4.0) -> Any:
    with needs("plot"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(6.4, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, path: str, data: Any) -> None:
    """The figure as PNG, and what it shows as JSON beside it."""
    base, extension = os.path.splitext(path)
    figure.savefig(path if extension else f"{base}.png", dpi=150)
    write_atomically(f"{base}.json", json.dumps(data, indent=1))
