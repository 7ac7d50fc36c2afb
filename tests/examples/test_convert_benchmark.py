"""The benchmark of converted adapters at toy sizes: every model is reported, and nothing wrong is timed."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
TINY = ["--hidden", "32", "--intermediate", "48", "--layers", "1", "--heads", "2", "--vocab", "64", "--tokens", "8"]
TINY += ["--batch", "2", "--steps", "2", "--warmup", "1", "--threads", "1", "--peers", "shira-k4", "supertuning-k2"]
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield importlib.import_module("convert")
    torch.set_num_threads(threads)
    for name in [name for name in sys.modules if name == "convert" or name.partition(".")[0] == "_common"]:
        del sys.modules[name]


def test_report_and_table_hold_every_model(bench, tmp_path, capsys):
    out = tmp_path / "results.json"
    bench.main([*TINY, "--out", str(out)])
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    names = [f"{peer}{what}" for peer in ("shira-k4", "supertuning-k2") for what in ("", " converted")]
    assert list(report["results"]) == [*names, "frozen", "lora-r8"]
    assert all(f"\n{name} " in printed for name in report["results"])
    for peer in ("shira-k4", "supertuning-k2"):
        theirs, ours = report["results"][peer], report["results"][f"{peer} converted"]
        assert theirs["trained_parameters"] == ours["trained_parameters"] > 0
        assert ours["saved_bytes"] < theirs["saved_bytes"] and len(ours["times"]) == 2
        assert max(report["gate"][peer].values()) < 1e-4


def test_nothing_is_timed_when_a_conversion_is_wrong(bench, monkeypatch):
    right = bench.convert

    def wrong(model):
        model = right(model)
        for name, parameter in model.named_parameters():
            if "neuroada_delta" in name:
                parameter.data.mul_(1.5)
        return model

    monkeypatch.setattr(bench, "convert", wrong)
    monkeypatch.setattr(bench, "interleave", None)
    with pytest.raises(bench.GateError, match="differs"):
        bench.main(TINY)
