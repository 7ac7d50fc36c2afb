"""The benchmark of selectors: scores are checked, and its figures are those of the work they stand for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import selection  # noqa: E402


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("benchmark") / "selection.json"
    sizes = ["--layers", "3", "--hidden", "64", "--image", "64", "--batches", "1", "--rounds", "1", "--threads", "1"]
    selection.main([*sizes, "--out", str(out)])
    return json.loads(out.read_text())


def test_every_selector_is_measured(content: dict[str, Any]) -> None:
    names = set(selection.selectors([], [], False))
    assert set(content["choosing_peak_bytes"]) == names == set(content["scoring_peak_bytes"])
    assert set(content["seconds"]) == {*names, "ordinary backward"}
    assert all(seconds > 0 for times in content["seconds"].values() for seconds in times)


def test_peaks_order_as_what_is_kept(content: dict[str, Any]) -> None:
    scoring, reference = content["scoring_peak_bytes"], content["reference_peak_bytes"]
    weights = 4 * content["parameters"]
    assert reference["ordinary backward"] > 0.9 * weights
    assert scoring["gradient"] > 0.9 * weights  # its sums
    assert scoring["activation"] < scoring["gradient, offloaded"] < scoring["gradient"]
    assert scoring["magnitude"] == 0


def test_optimiser_state_is_two_numbers_per_trained_one(content: dict[str, Any]) -> None:
    dense, sparse = (content["optimiser_bytes"][name] for name in ("masked dense training", "GPS"))
    assert dense == pytest.approx(8 * content["parameters"], rel=0.01)
    assert sparse < 0.2 * dense


def test_wrong_scores_are_not_measured() -> None:
    base = selection.build(1, 64, 32, CPU)
    batches = selection.random_batches(1, 4, 32, CPU)
    right = selection.selectors(batches, batches, False)["gradient"]
    wrong = selection.Selector("gradient", lambda model: {n: 2 * s for n, s in right.score(model).items()})
    selection.gate(base, batches, {"right": right})
    with pytest.raises(selection.GateError, match="'wrong' are off"):
        selection.gate(base, batches, {"wrong": wrong})
