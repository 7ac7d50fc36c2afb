"""The multi-task scripts run at their smallest setting and leave what they promise."""

import json
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "mtl"))


def test_synthetic_writes_conflicts_figures_and_metrics(tmp_path, capsys):
    import synthetic

    synthetic.main(["--epochs", "1", "--method", "famo", "--mask", "psn", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["test"]) == {"upper", "lower"}
    assert len((tmp_path / "gradient_conflicts.jsonl").read_text().splitlines()) == 24  # steps
    for figure in ("incidence", "cosines", "angles", "layers"):
        assert (tmp_path / f"{figure}.png").exists() and (tmp_path / f"{figure}.json").exists()
    assert "noise_floor" in capsys.readouterr().out


@pytest.mark.parametrize("from_folder", [False, True], ids=["made here", "from a folder"])
def test_text_tasks_learn(tmp_path, capsys, from_folder):
    pytest.importorskip("trl")
    import text_tasks

    options = ["--steps", "4", "--out", str(tmp_path / "out")]
    if from_folder:
        for part in text_tasks.small_llama():
            part.save_pretrained(tmp_path / "llama")
        options += ["--model", str(tmp_path / "llama"), "--method", "cagrad"]
    text_tasks.main(options)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "->" in line]
    assert [line[0] for line in lines] == ["copy", "reverse"]
    assert all(float(line[-1]) < float(line[-3]) for line in lines)
