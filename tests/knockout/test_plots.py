"""Figures are written with the numbers behind them, and these are means and intervals over samples."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from peft_ext.knockout import plot_answer_probability, plot_jaccard, plot_sweep, plot_token_map
from peft_ext.knockout.plots import bootstrap


pytest.importorskip("matplotlib")
GENERATOR = np.random.default_rng(0)
VALUES = {"a": GENERATOR.normal(-20, 10, (30, 5)), "b": GENERATOR.normal(0, 1, (30, 5))}


def records(value, by):
    return [
        {"sample": str(sample), "layer": layer, by: name, value: float(table[sample, layer])}
        for name, table in VALUES.items()
        for sample in range(30)
        for layer in range(5)
    ]


@pytest.mark.parametrize(
    ("plot", "value", "by"),
    [
        (plot_sweep, "change_percent", "pair"),
        (plot_answer_probability, "probability", "word"),
        (plot_jaccard, "jaccard", "intervention"),
    ],
)
def test_numbers_behind_the_figure(tmp_path, plot, value, by):
    rows = plot(records(value, by), tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size[0] > 400
    written = list(csv.DictReader((tmp_path / "figure.csv").open()))
    assert [{k: str(v) for k, v in row.items()} for row in rows] == written
    for row in rows:
        own = VALUES[row[by]][:, row["layer"]]
        assert row["mean"] == pytest.approx(own.mean()) and row["samples"] == 30
        # the percentile interval of a mean of many is close to the normal one
        error = 1.96 * own.std() / np.sqrt(30)
        assert row["low"] == pytest.approx(own.mean() - error, abs=0.4 * error)
        assert row["high"] == pytest.approx(own.mean() + error, abs=0.4 * error)


def test_one_sample_has_no_spread():
    mean, low, high = bootstrap(np.array([[1.0, 2.0]]), 10, 0)
    assert (mean == low).all() and (mean == high).all()


def test_token_map(tmp_path):
    values = torch.arange(6.0)
    rows = plot_token_map(Image.new("RGB", (30, 20)), values, tmp_path / "map.png", grid=(2, 3))
    assert [row["value"] for row in rows] == values.tolist() and rows[4] == {"row": 1, "column": 1, "value": 4.0}
    with pytest.raises(ValueError, match=r"does not fill a grid of 2 x 2"):
        plot_token_map(Image.new("RGB", (30, 20)), values, tmp_path / "map.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda all_of_them: [], "records is empty"),
        (lambda all_of_them: all_of_them[:-1], "was the sweep interrupted"),
        (lambda all_of_them: [{"sample": "a"}], "lack the column"),
    ],
)
def test_malformed_records(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        plot_sweep(change(records("change_percent", "pair")), tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


def test_figures_are_png(tmp_path):
    with pytest.raises(ValueError, match="must end in .png"):
        plot_sweep(records("change_percent", "pair"), tmp_path / "figure.pdf")
