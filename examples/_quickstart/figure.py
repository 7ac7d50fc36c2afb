"""Accuracy against the number of trained parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # files only, also where there is no display

from matplotlib import pyplot as plt

from .report import Row


MARKERS = "osD^vPX*"
BESIDE = 1.13  # factor between neighbours: the width of a marker


def _spread(counts: Sequence[int]) -> list[float]:
    """Where to draw each count: equal ones next to each other around the place where they belong."""
    shares = [
        counts[:index].count(count) - (counts.count(count) - 1) / 2  # -1, 0, 1 for three of a kind
        for index, count in enumerate(counts)
    ]
    return [count * BESIDE**share for count, share in zip(counts, shares, strict=True)]


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
