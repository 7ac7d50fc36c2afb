"""The benchmark of merging and unmerging at a toy size: nothing of ours moves, LoRA's base does."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import get_peft_model

from peft_ext import NeuroAdaConfig


pytest.importorskip("trl")
BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
TINY = ["--steps", "2", "--pretraining", "2", "--width", "16", "--samples", "4", "--cycles", "1", "3"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("drift")
    del sys.modules["drift"]


@pytest.mark.filterwarnings("ignore")
def test_only_loras_base_moves(bench: ModuleType, tmp_path: Path, capsys) -> None:
    out = tmp_path / "drift.json"
    bench.main([*TINY, "--methods", "NeuroAda k=4", "LoRA r=8", "--out", str(out)])
    ours, lora = json.loads(out.read_text())["results"].values()
    assert [one["cycles"] for one in ours["cycles"]] == [1, 3]
    for found in (ours["drift"], *ours["cycles"]):
        assert found["weights"] == found["largest"] == found["changed"] == found["logits"] == 0
    assert ours["difference"] == 0 and ours["same"] == 1 and ours["trained"] == ours["served"]
    assert lora["drift"]["changed"] > 0 and lora["difference"] > 0
    assert "| NeuroAda k=4 | 3 | 0.0 | 0 | 0 |" in capsys.readouterr().out


def test_vllm_gets_the_merged_weights_by_the_bases_names(bench: ModuleType, tmp_path: Path) -> None:
    bench.pretrained(tmp_path, 16, 1)
    model = get_peft_model(bench.base_model(tmp_path), NeuroAdaConfig(k=2, init_weights=False))
    read = {name: tensor.clone() for name, tensor in bench.weights_for_vllm(model)}
    expected = dict(model.merge_and_unload().named_parameters())
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in read)
