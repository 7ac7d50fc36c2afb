"""Accuracy against the number of trained parameters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # files only, also where there is no display

from matplotlib import pyplot as plt

from .report import Row


MARKERS = "osD^vPX*"
CLOSE = 1.25  # points whose parameter counts differ by less than this factor would cover each other


def _spread(counts: Sequence[int]) -> list[float]:
    """Where to draw each count: as it is, or next to its neighbours if several lie at about the same place."""
    places = [float(count) for count in counts]
    order = sorted(range(len(counts)), key=lambda index: counts[index])
    for before, index in pairwise(order):
        places[index] = max(places[index], places[before] * CLOSE)
    return places


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Write a PNG with one point per method, mean and standard deviation over the seeds."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for row, place, marker in zip(rows, _spread([row.trained_parameters for row in rows]), MARKERS, strict=False):
        axes.errorbar(
            place,
            100 * row.mean,
            yerr=100 * row.deviation,
            marker=marker,
            markersize=9 if row is rows[0] else 7,
            capsize=4,
            linestyle="none",
            label=f"{row.label} ({row.trained_parameters:,})",
        )
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters, classifier included (log scale; equal counts drawn side by side)")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
