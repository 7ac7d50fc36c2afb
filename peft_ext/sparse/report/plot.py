"""The figure of a selection report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...extras import needs
from .selection_report import SelectionReport, short_names


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(report: SelectionReport) -> Figure:
    """
    Bars per block, and a matrix of overlaps where there are several adapters. Raises `ImportError` if matplotlib is
    not installed.
    """
    with needs("plot"):
        from matplotlib.figure import Figure
    adapters, blocks = report.adapters, report.blocks
    several = len(adapters) > 1
    width = max(5.0, 0.35 * len(blocks) + 2.5)
    # No pyplot: the figure is nobody's current one, needs no display and is freed with its last reference.
    names = short_names(blocks)
    height = 3.5 + 0.08 * max(map(len, names))  # the names stand upright below the bars
    figure = Figure(figsize=(width + 3.5 * several, height), layout="constrained")
    axes: Any = figure.subplots(1, 1 + several, squeeze=False, width_ratios=[width, 3.5] if several else None)[0]
    bar = 0.8 / len(adapters)
    for number, adapter in enumerate(adapters):
        shares = [100 * share for share in report.distribution(adapter).values()]
        place = np.arange(len(blocks)) + (number - (len(adapters) - 1) / 2) * bar
        axes[0].bar(place, shares, bar, label=adapter)
    axes[0].set_xticks(range(len(blocks)), names, rotation=90)
    axes[0].set_ylabel("share of entries, %")
    axes[0].set_title("selected entries by block")
    if several:
        axes[0].legend()
        _draw_overlaps(axes[1], report)
    return figure


def _draw_overlaps(axes: Any, report: SelectionReport) -> None:
    adapters = report.adapters
    shares = np.full((len(adapters), len(adapters)), 100.0)
    for overlap in report.overlaps:
        if len(overlap.adapters) == 2:
            i, j = (adapters.index(name) for name in overlap.adapters)
            shares[i, j] = shares[j, i] = 100 * overlap.share
    axes.imshow(shares, vmin=0, vmax=100, cmap="Blues")
    for i, j in np.ndindex(*shares.shape):
        color = "white" if shares[i, j] > 60 else "black"
        axes.text(j, i, f"{shares[i, j]:.0f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(adapters)), adapters, rotation=90)
    axes.set_yticks(range(len(adapters)), adapters)
    axes.set_title("shared entries, %")
