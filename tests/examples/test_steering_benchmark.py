"""The steering benchmark at toy sizes: its methods train what they say, and a wrong MoReS is not timed."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
TINY = ["--hidden", "32", "--intermediate", "48", "--layers", "3", "--heads", "2", "--vocab", "64", "--side", "3"]
TINY += ["--text-tokens", "8", "--steps", "2", "--warmup", "1", "--threads", "1"]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    llava = importlib.import_module("_common.llava")
    yield SimpleNamespace(steering=importlib.import_module("steering"), llava=llava)
    torch.set_num_threads(threads)
    for name in [name for name in sys.modules if name == "steering" or name.partition(".")[0] == "_common"]:
        del sys.modules[name]


def test_report_and_table(bench, tmp_path, capsys):
    out = tmp_path / "results.json"
    bench.steering.main([*TINY, "--out", str(out)])
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert list(report["results"]) == list(bench.steering.METHODS)
    for name, result in report["results"].items():
        assert len(result["times"]) == 2 and set(result["ratios"]) == {"frozen", "lora-r8"}
        assert sum(line.split()[:1] == [name] for line in printed.splitlines()) == 1
    trained = {name: result["trained_parameters"] for name, result in report["results"].items()}
    assert trained["frozen"] == 0
    assert trained["mores-r1"] == trained["mores-r1@100"] == 2 * (2 * 32 + 1)


def test_a_wrong_mores_is_not_timed(bench, monkeypatch):
    from peft_ext.tuners.mores.steering import Steering

    right = Steering.forward
    monkeypatch.setattr(Steering, "forward", lambda self, hidden: 1.1 * right(self, hidden))
    with pytest.raises(RuntimeError, match="nothing is timed"):
        bench.steering.main(TINY)
