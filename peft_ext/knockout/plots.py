"""Figures of information flow, each written as a PNG and as the numbers behind it, a CSV of the same name."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..extras import needs
from ..io import write_atomically


LEVEL = 0.95


def plot_sweep(
    records: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    by: str = "pair",
    title: str = "",
    resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """
    Draw the mean change of the answer's probability over the layers, one curve per pair, with 95 % bootstrap intervals
    over samples.

    Args:
        records (`list[dict]`):
            Records of [`layer_sweep`].
        path (`str`):
            File of the PNG.
        by (`str`, *optional*, defaults to `"pair"`):
            Name of the column that tells curves apart.
        title (`str`, *optional*):
            Title of the figure.
        resamples (`int`, *optional*, defaults to 1000):
            Number of bootstrap samples.
        seed (`int`, *optional*, defaults to 0):
            Seed of the bootstrap.

    Returns:
        `list[dict]`: The numbers behind the figure: curve, layer, mean, low, high, samples.

    Raises:
        `ValueError`: If the records lack a column, or a curve lacks a layer for some sample.
    """
    label = "change of the answer's probability (%)"
    return _curves(records, "change_percent", by, path, label, title, resamples, seed, zero=True)


def plot_answer_probability(
    records: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    by: str = "word",
    title: str = "",
    resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """
    Draw the records of [`answer_probability_by_layer`], one curve per word, with 95 % bootstrap intervals over
    samples.

    Args:
        records (`list[dict]`):
            Records of [`answer_probability_by_layer`].
        path, by, title, resamples, seed:
            As for [`plot_sweep`].

    Returns:
        `list[dict]`: The numbers behind the figure, as for [`plot_sweep`].
    """
    return _curves(records, "probability", by, path, "probability", title, resamples, seed)


def plot_jaccard(
    records: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    by: str = "intervention",
    title: str = "",
    resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """
    Draw the records of [`topk_jaccard`], one curve per intervention, with 95 % bootstrap intervals over samples.

    Args:
        records (`list[dict]`):
            Records of [`topk_jaccard`].
        path, by, title, resamples, seed:
            As for [`plot_sweep`].

    Returns:
        `list[dict]`: The numbers behind the figure, as for [`plot_sweep`].
    """
    return _curves(records, "jaccard", by, path, "Jaccard similarity", title, resamples, seed)


def bootstrap(values: np.ndarray, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and percentile interval (low, high) over samples, each `[layers]`, of `values` `[samples, layers]`."""
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}: must be at least 1.")
    generator = np.random.default_rng(seed)
    means = np.stack([values[generator.integers(len(values), size=len(values))].mean(0) for _ in range(resamples)])
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return values.mean(0), low, high


def summarise(
    records: Iterable[Mapping[str, Any]], value: str, by: str, resamples: int = 1000, seed: int = 0
) -> list[dict[str, Any]]:
    """Mean and interval by curve and layer: a list of dicts with `by`, `layer`, `mean`, `low`, `high`, `samples`."""
    curves: dict[str, dict[int, dict[str, float]]] = {}
    for record in records:
        missing = [column for column in (value, by, "layer", "sample") if column not in record]
        if missing:
            raise ValueError(f"records lack the column(s) {', '.join(missing)}; they have {', '.join(record)}.")
        curves.setdefault(str(record[by]), {}).setdefault(int(record["layer"]), {})[str(record["sample"])] = float(
            record[value]
        )
    if not curves:
        raise ValueError("records is empty: there is nothing to draw.")
    rows = []
    for curve, layers in curves.items():
        samples = list(layers[min(layers)])
        if any(set(found) != set(samples) for found in layers.values()):
            raise ValueError(f"{by}={curve}: not every sample has every layer; was the sweep interrupted?")
        order = sorted(layers)
        table = np.array([[layers[layer][sample] for layer in order] for sample in samples])
        for layer, mean, low, high in zip(order, *bootstrap(table, resamples, seed), strict=True):
            rows.append(
                {
                    by: curve,
                    "layer": layer,
                    "mean": float(mean),
                    "low": float(low),
                    "high": float(high),
                    "samples": len(samples),
                }
            )
    return rows


def _curves(
    records: Iterable[Mapping[str, Any]],
    value: str,
    by: str,
    path: str | os.PathLike[str],
    label: str,
    title: str,
    resamples: int,
    seed: int,
    zero: bool = False,
) -> list[dict[str, Any]]:
    rows = summarise(records, value, by, resamples, seed)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for curve in dict.fromkeys(row[by] for row in rows):
            own = [row for row in rows if row[by] == curve]
            layers = [row["layer"] for row in own]
            (line,) = axes.plot(layers, [row["mean"] for row in own], label=str(curve).replace(":", " → "), marker=".")
            axes.fill_between(
                layers, [row["low"] for row in own], [row["high"] for row in own], alpha=0.2, color=line.get_color()
            )
        if zero:
            axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        axes.set_title(title)
        axes.legend(frameon=False)

    write_figure(path, draw, rows)
    return rows


def plot_token_map(
    image: Any,
    values: Tensor | Sequence[float],
    path: str | os.PathLike[str],
    grid: tuple[int, int] | None = None,
    label: str = "",
    title: str = "",
) -> list[dict[str, Any]]:
    """
    Draw one number per image token over the image: changes of the answer, coverage, or membership in a group.

    Args:
        image (`PIL.Image.Image` or array `[height, width, 3]`):
            The image as the model sees it, so cropped or padded.
        values (`torch.Tensor`):
            Numbers, float `[tokens]`, row by row.
        path (`str`):
            File of the PNG.
        grid (`tuple[int, int]`, *optional*):
            Rows and columns of tokens; by default a square.
        label (`str`, *optional*):
            Label of the colour bar.
        title (`str`, *optional*):
            Title of the figure.

    Raises:
        `ValueError`: If the values do not fill the grid.
    """
    numbers = np.asarray(values.detach().cpu().float() if isinstance(values, Tensor) else values, dtype=float)
    side = math.isqrt(numbers.size)
    rows, columns = grid or (side, side)
    if numbers.ndim != 1 or rows * columns != numbers.size or not numbers.size:
        raise ValueError(
            f"values has the shape {numbers.shape}, which does not fill a grid of {rows} x {columns} tokens: pass "
            "grid=(rows, columns), and leave newline and class tokens out."
        )
    table = numbers.reshape(rows, columns)
    picture = np.asarray(image)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        extent = (0, picture.shape[1], picture.shape[0], 0)
        axes.imshow(picture, extent=extent, cmap="gray" if picture.ndim == 2 else None)
        shown = axes.imshow(table, extent=extent, alpha=0.5, cmap="viridis", interpolation="nearest")
        figure.colorbar(shown, ax=axes, label=label)
        axes.set_axis_off()
        axes.set_title(title)

    data = [
        {"row": row, "column": column, "value": float(table[row, column])}
        for row in range(rows)
        for column in range(columns)
    ]
    write_figure(path, draw, data)
    return data


def write_figure(path: str | os.PathLike[str], draw: Callable[[Any], None], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a figure as a PNG, with its `rows` as a CSV beside it. Raises `ValueError` if `path` is no PNG's."""
    target = Path(path)
    if target.suffix != ".png":
        raise ValueError(f"path is {str(path)!r}: figures are PNG files, so it must end in .png.")
    with needs("plot"):
        from matplotlib.figure import Figure
    target.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(6, 4), layout="constrained")
    draw(figure)
    figure.savefig(target, dpi=150)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(str(target.with_suffix(".csv")), text.getvalue())
