"""The benchmarks of the products at toy sizes: right before timed, all lines there, nothing measured twice."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
TINY = ["--shapes", "12x8", "8x16", "--tokens", "5", "--k", "1", "3", "--dtype", "float32", "--rounds", "1"]
TINY += ["--working-set", "1", "--threads", "1"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield SimpleNamespace(ops=importlib.import_module("ops"), crossover=importlib.import_module("crossover"))
    torch.set_num_threads(threads)
    for name in [name for name in sys.modules if name in ("ops", "crossover") or name.partition(".")[0] == "_common"]:
        del sys.modules[name]


def test_every_product_is_checked_timed_and_written(bench: SimpleNamespace, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bench.ops, "seconds", lambda works, rounds, device: [work() for work in works[:2]] and 0.001)
    out = tmp_path / "ops.json"
    bench.ops.main([*TINY, "--out", str(out)])
    report = json.loads(out.read_text())
    assert len(report["results"]) == 2 * 2 * 3  # shapes, k, products
    assert report["kernels"] == "torch" and report["copy_bytes_per_second"] == pytest.approx(2 * 2**20 / 0.001)
    forward = report["results"][0]
    # 5 tokens: 12 outputs read and written, 8 inputs read; 12 values and 12 indices
    assert (forward["product"], forward["bytes"]) == ("forward", 4 * 5 * (2 * 12 + 8) + 2 * 4 * 12)
    assert forward["share_of_copy"] == pytest.approx(forward["bytes"] / (2 * 2**20))
    assert all(result["error"] <= 1e-5 for result in report["results"])


@pytest.mark.parametrize("product", ["bypass", "sparse_grad_values", "sparse_grad_input"])
def test_a_wrong_product_is_not_timed(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, product: str) -> None:
    right = getattr(bench.ops, product)
    monkeypatch.setattr(bench.ops, product, lambda *arguments: 1.01 * right(*arguments))
    with pytest.raises(RuntimeError, match="nothing is timed"):
        bench.ops.main(TINY)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shapes", "256"], "--shapes: must be ROWSxFAN_IN, two positive integers such as 4096x4096, got 256"),
        (["--shapes", "12x8", "0x8"], "--shapes: must be .* got 0x8"),
        (["--shapes", "12x8", "--k", "3", "9"], "--k 9 is above the fan-in of --shapes 12x8: leave one of them out"),
        (["--dtype", "float8"], "--dtype: invalid choice: 'float8' .*float32.*bfloat16"),
    ],
)
def test_an_argument_that_cannot_be_is_refused_before_anything_is_measured(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str],
    said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(bench.ops, "seconds", lambda *arguments: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stopped:
        bench.ops.main(arguments)
    assert stopped.value.code == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_run_of_the_grid_goes_on_where_it_stopped(
    bench: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(set(bench.crossover.GRID)) == 100
    monkeypatch.setattr(bench.crossover, "GRID", [(8, 16, 1, 3), (8, 16, 8, 3)])
    arguments = ["--rounds", "1", "--seconds", "0", "--threads", "1", "--out", str(tmp_path / "grid.json")]
    (first,) = bench.crossover.main([*arguments, "--points", ":1"])
    first_again, second = bench.crossover.main(arguments)
    assert first_again["seconds"] == first["seconds"] and second["k"] == 8
    assert second["auto_over_best"] >= 1
    assert "of 2 points" in capsys.readouterr().out
    monkeypatch.setattr(bench.crossover, "measure", lambda *arguments: pytest.fail("measured again"))
    assert len(bench.crossover.main([*arguments, "--report"])) == 2
