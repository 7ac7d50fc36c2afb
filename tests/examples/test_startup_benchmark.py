"""What surrounds training, measured: every step is timed, and an adapter that comes back changed is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest


BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import startup  # noqa: E402


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("benchmark") / "startup.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup, "run_alone", startup.run)  # not in processes of their own, which import for seconds
        startup.main(["--quick", "--threads", "1", "--out", str(out)])
    return json.loads(out.read_text())


def test_every_step_of_every_method_is_measured(content: dict[str, Any]) -> None:
    runs = content["sizes"]["tiny"]["runs"]
    assert set(runs) == set(startup.METHODS)
    for run in (run for mine in runs.values() for run in mine):
        assert set(run["seconds"]) == {*startup.STEPS, "amax pass"}
        assert all(seconds["wall"] > 0 for seconds in run["seconds"].values())
        assert min(run["peak_bytes"].values()) >= run["adapter_bytes"] / 2 > 0
        assert run["file_bytes"] > run["adapter_bytes"]


def test_ratios_are_of_what_they_say(content: dict[str, Any]) -> None:
    size = content["sizes"]["tiny"]
    (lora,), (sparse,) = (size["runs"][method] for method in ("lora-r8", "neuroada-k1"))
    found = size["wall_ratios"]["neuroada-k1"]
    assert found["load / LoRA"] == sparse["seconds"]["load"]["wall"] / lora["seconds"]["load"]["wall"]
    assert found["adapt / amax pass"] == sparse["seconds"]["adapt"]["wall"] / sparse["seconds"]["amax pass"]["wall"]


def test_neuroada_comes_back_to_every_bit(content: dict[str, Any]) -> None:
    runs = content["sizes"]["tiny"]["runs"]
    assert all(runs[method][0]["unmerging_restores_every_bit"] for method in ("neuroada-k1", "neuroada-k20"))


def test_adapter_that_is_not_loaded_as_saved_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = startup.get_peft_model(startup.model_of(startup.SIZES["tiny"]), startup.METHODS["neuroada-k1"]())
    saved = {name: tensor.clone() for name, tensor in startup.get_peft_model_state_dict(model).items()}
    startup.assert_equal_adapters(model, saved)
    startup.fill(model)
    with pytest.raises(RuntimeError, match="was not loaded as it was saved"):
        startup.assert_equal_adapters(model, saved)
