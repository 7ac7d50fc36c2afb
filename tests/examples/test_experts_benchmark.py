"""The benchmark of fused experts at a toy size: right before timed, every line there."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
TINY = ["--hidden", "16", "--intermediate", "24", "--experts", "4", "--tokens", "6", "--k", "1", "2", "--rank", "2"]
TINY += ["--threads", "1", "--steps", "2", "--warmup", "1"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield importlib.import_module("experts")
    torch.set_num_threads(threads)
    for name in [name for name in sys.modules if name == "experts" or name.partition(".")[0] == "_common"]:
        del sys.modules[name]


def test_every_method_is_timed_and_written(bench: ModuleType, tmp_path: Path, capsys) -> None:
    out = tmp_path / "experts.json"
    bench.main([*TINY, "--out", str(out)])
    report = json.loads(out.read_text())
    trained = {name: result["trained_parameters"] for name, result in report["results"].items()}
    assert trained == {"neuroada-k1": 256, "neuroada-k2": 512, "lora-r2": 2 * 4 * (16 + 48 + 24 + 16), "frozen": 0}
    assert all(len(result["times"]) == 2 for result in report["results"].values())
    assert report["gate"].keys() == {"neuroada-k1", "neuroada-k2"}
    assert "lora-r2 (quartiles)" in capsys.readouterr().out


def test_what_is_wrong_is_not_timed(bench: ModuleType, monkeypatch) -> None:
    from peft_ext.sparse.layers.experts import SparseExpertBank

    right = SparseExpertBank.add
    monkeypatch.setattr(SparseExpertBank, "add", lambda *arguments: right(*arguments) * 1.01)
    with pytest.raises(RuntimeError, match="neuroada-k1 differs from dense weights"):
        bench.main(TINY)


def test_more_experts_for_a_token_than_there_are(bench: ModuleType, capsys) -> None:
    with pytest.raises(SystemExit):
        bench.main([*TINY, "--per-token", "5"])
    assert "per-token" in capsys.readouterr().err
