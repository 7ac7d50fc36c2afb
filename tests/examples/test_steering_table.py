"""The table's script at its smallest: what it writes, and that it goes on where it stopped."""

import json
from pathlib import Path

import pytest
import steering_table
from _shapes.steering import SHIFTED
from _shapes.world import PALETTE


ROOT = Path(__file__).parents[2]
TINY = ["--seeds", "1", "--steps", "1", "--images", "2", "--turns", "1", "--questions", "4", "--lmar-samples", "2"]


def test_table_figure_and_going_on(tmp_path, capsys, monkeypatch):
    steering_table.main(["--out", str(tmp_path), *TINY, "--methods", "none", "mores-1@1"])
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "steering_table.json").read_text())
    assert [run["method"] for run in content["runs"]] == ["none", "mores-1@1"]
    assert [row["trained_parameters"] for row in content["summary"]] == [0, 5 * (2 * 64 + 1)]
    assert (tmp_path / "steering_table.md").read_text() in printed
    assert (tmp_path / "steering_lmar.png").exists() and (tmp_path / "steering_lmar.csv").exists()

    ran = []
    run = steering_table.run
    monkeypatch.setattr(steering_table, "run", lambda name, *rest: ran.append(name) or run(name, *rest))
    steering_table.main(["--out", str(tmp_path), *TINY, "--methods", "none", "mores-1@1", "connector-1"])
    assert ran == ["connector-1"]
    again = json.loads((tmp_path / "steering_table.json").read_text())
    assert again["runs"][:2] == content["runs"]


def test_results_of_other_settings_are_not_mixed(tmp_path):
    steering_table.main(["--out", str(tmp_path), *TINY, "--methods", "none"])
    with pytest.raises(SystemExit, match="other settings"):
        steering_table.main(["--out", str(tmp_path), *TINY, "--turns", "2", "--methods", "none"])


def test_the_shift_renames_every_color_and_nothing_else():
    assert sorted(SHIFTED.values()) == sorted(PALETTE.values())
    assert all(SHIFTED[name] != value for name, value in PALETTE.items())


def test_the_documentation_prints_the_committed_table():
    table = (ROOT / "examples" / "results" / "steering" / "steering_table.md").read_text()
    page = (ROOT / "docs" / "reproduction.md").read_text()
    assert [line for line in table.splitlines() if line.startswith("|") and line not in page] == []
