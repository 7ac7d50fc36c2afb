"""The command for a GPU, rehearsed at toy sizes on the CPU: every stage runs, goes on after failures, can be ended."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests._processes import run


BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Iterator[Namespace]:
    """The command's modules, imported as the script imports them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("record", "processes", "summary", "bandwidth", "kernels")
    yield Namespace(**{name: importlib.import_module(f"_gpu_check.{name}") for name in names})
    ours = ("ops", "experts", "crossover", "gpu_check", "_common", "_gpu_check")
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_rehearsal_runs_every_stage_but_the_suite(tmp_path: Path) -> None:
    stages = ["kernels", "bandwidth", "steps", "experts", "startup", "crossovers"]
    options = [
        "--device",
        "cpu",
        "--tiny",
        "--minutes",
        "5",
        "--out",
        str(tmp_path / "out"),
        "--stages",
        ",".join(stages),
    ]
    done = run(BENCHMARKS / "gpu_check.py", *options, output=tmp_path / "printed")
    assert done.returncode == 0, done.stderr
    reports = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in stages}
    for name, report in reports.items():
        assert report["finished"] and report["results"] and f"== {name} ended" in done.stdout
        assert not any("failed" in row for row in report["results"]), name
    assert {row["status"] for row in reports["kernels"]["results"]} == {"ok"}
    assert {row["experts"] for row in reports["kernels"]["results"]} == {0, 3}
    assert {row["method"] for row in reports["experts"]["results"]} == {"neuroada-k1", "lora-r8", "frozen"}
    families = {"staged" if "block_tokens=0" in row["config"] else "direct" for row in reports["kernels"]["results"]}
    assert families == {"direct", "staged"}
    assert {row["method"] for row in reports["steps"]["results"]} >= {"frozen", "neuroada-k1", "lora-r8", "masked-k20"}
    assert all(entry["passed"] for entry in reports["steps"]["gate"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*(f"{name}.json" for name in stages), "summary.txt"]
    )


def test_a_stage_goes_on_after_a_failure_and_keeps_what_it_has(check: Namespace, tmp_path: Path) -> None:
    args = Namespace(device="cpu", out=tmp_path)
    record = check.record.Record("stage", args, seconds=60)

    def fail() -> dict[str, float]:
        raise ValueError("no such size")

    assert not record.attempt({"case": 1}, fail)
    assert record.attempt({"case": 2}, lambda: {"value": 2.0})
    record.end = 0
    assert not record.attempt({"case": 3}, lambda: pytest.fail("ran without time"))
    record.finish()
    content = json.loads((tmp_path / "stage.json").read_text())
    assert content["results"] == [{"case": 1, "failed": "ValueError: no such size"}, {"case": 2, "value": 2.0}]
    assert content["left_out"] == ["case=3"] and not content["finished"]


def test_processes_end_by_themselves_or_are_ended(check: Namespace, tmp_path: Path) -> None:
    def write(name: str) -> None:
        (tmp_path / name).write_text("here")

    works = [
        lambda: write("first"),
        lambda: time.sleep(60),
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        lambda: write("last"),
    ]
    begin = time.monotonic()
    ended = dict(check.processes.each(works, 2, lambda: 1.0))
    assert time.monotonic() - begin < 10
    assert [ended[number].split(" after")[0] for number in range(4)] == [
        "ended", "stopped", "failed (SIGKILL)", "ended",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "last"]
    ((_, how),) = check.processes.each([lambda: write("never")], 1, lambda: 0.0)
    assert how.startswith("left out") and not (tmp_path / "never").exists()


def test_a_kernel_that_is_wrong_or_fails_is_told_from_one_that_is_right(check: Namespace) -> None:
    exact = torch.randn(8, 8, dtype=torch.float64)
    expected = (exact, exact.abs())
    found = exact.to(torch.bfloat16)
    assert check.kernels.outcome(lambda: found, expected)["status"] == "ok"
    assert check.kernels.outcome(lambda: found * 1.02, expected)["status"] == "wrong"
    assert check.kernels.outcome(lambda: found.fill_(torch.nan), expected)["status"] == "wrong"

    def fail() -> torch.Tensor:
        raise RuntimeError("CompilationError: at 3:4")

    assert check.kernels.outcome(fail, expected) == {
        "status": "error",
        "message": "RuntimeError: CompilationError: at 3:4",
    }
