"""The experiment compares like with like, goes on where it stopped, and its report says what its runs are."""

import json
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "mtl"))

import experiment  # noqa: E402
from _benches import BENCHES  # noqa: E402
from _experiment.report import markdown  # noqa: E402
from _experiment.results import choose_rates, differences_of, rows_of, summaries_of  # noqa: E402


COMMITTED = ROOT / "examples" / "results" / "mtl"
TINY = ["--benches", "digits", "--methods", "joint", "famo", "--masks", "full", "psn", "--rates", "1e-3", "3e-3"]
TINY += ["--seeds", "0", "1", "--epochs", "2", "--search-epochs", "1", "--images", "128"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("experiment")
    experiment.main([*TINY, "--out", str(out)])
    return out


def runs_in(folder):
    return [json.loads(line) for line in (folder / "runs_digits.jsonl").read_text().splitlines()]


def test_every_cell_has_the_same_search_and_then_paired_seeds(folder):
    runs = runs_in(folder)
    cells = {}
    for run in runs:
        kind = "search" if run["seed"] == 100 else "final"
        cells.setdefault((run["method"], run["mask"], run["task"]), {}).setdefault(kind, []).append(run)
    assert len(cells) == 2 + 2 * 2  # single tasks, methods x masks
    for cell in cells.values():
        assert [run["learning_rate"] for run in cell["search"]] == [1e-3, 3e-3]
        assert [run["seed"] for run in cell["final"]] == [0, 1]
        assert len({run["learning_rate"] for run in cell["final"]}) == 1


def test_an_interrupted_experiment_goes_on(folder, tmp_path, monkeypatch):
    lines = (folder / "runs_digits.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs_digits.jsonl").write_text("".join(lines[:-1]))
    trained = []

    def train(bench, run):
        trained.append(run)
        return {key: value for key, value in json.loads(lines[-1]).items() if key != "cpu_seconds"}

    monkeypatch.setattr(experiment, "train", train)
    experiment.main([*TINY, "--out", str(tmp_path)])
    last = json.loads(lines[-1])
    assert [(run.method, run.mask, run.seed) for run in trained] == [(last["method"], last["mask"], last["seed"])]
    assert len(runs_in(tmp_path)) == len(lines)


def test_report_and_figure_are_of_the_runs(folder):
    report = json.loads((folder / "mtl_experiment.json").read_text())
    assert report["runs"] == runs_in(folder)
    assert (folder / "mtl_experiment.md").read_text() == markdown(report)
    assert (folder / "mtl_experiment.png").stat().st_size > 10_000
    curves = json.loads((folder / "mtl_experiment_figure.json").read_text())["digits"]["incidence_by_epoch_joint"]
    assert {mask: [len(values) for values in seeds] for mask, seeds in curves.items()} == {
        "full": [2, 2],
        "psn": [2, 2],
    }


def test_a_seed_for_the_search_is_not_reported():
    with pytest.raises(SystemExit):
        experiment.main(["--seeds", "0", "100"])


def run_of(method, mask, rate, seed, accuracy, task=None, incidence=50.0):
    tasks = [task] if task else ["upper", "lower"]
    metrics = {name: {"top1": accuracy} for name in tasks}
    conflicts = {f"gradient_conflict_{key}": incidence for key in ("incidence_all", "incidence_last_half")}
    settings = {"bench": "digits", "method": method, "mask": mask, "learning_rate": rate, "seed": seed, "task": task}
    return {**settings, "validation": metrics, "test": metrics, **conflicts, "gradient_conflict_noise_floor": 20.0}


def test_rates_are_those_that_do_best_on_validation_data():
    runs = [run_of("joint", "full", 1e-3, 100, 80.0, task) for task in ("upper", "lower")]
    runs += [
        run_of("joint", "full", 3e-3, 100, accuracy, task) for task, accuracy in (("upper", 90.0), ("lower", 70.0))
    ]
    runs += [run_of("joint", "full", rate, 100, accuracy) for rate, accuracy in ((1e-3, 60.0), (3e-3, 61.0))]
    runs += [run_of("joint", "psn", rate, 100, accuracy) for rate, accuracy in ((1e-3, 62.0), (3e-3, 61.0))]
    assert choose_rates(BENCHES["digits"], runs) == {
        ("joint", "full", "upper"): 3e-3,
        ("joint", "full", "lower"): 1e-3,
        ("joint", "full", None): 3e-3,
        ("joint", "psn", None): 1e-3,
    }


def test_rows_and_differences_by_hand():
    bench = BENCHES["digits"]
    runs = []
    for seed, (full, psn) in enumerate([(40.0, 60.0), (60.0, 50.0)]):
        runs += [run_of("joint", "full", 1e-3, seed, 80.0, task) for task in bench.tasks]
        runs += [run_of("joint", "full", 1e-3, seed, full, incidence=30.0)]
        runs += [run_of("joint", "psn", 1e-3, seed, psn, incidence=20.0)]
    rows = rows_of(bench, runs)
    assert [row["task_drop"] for row in rows] == [pytest.approx([50.0, 25.0]), pytest.approx([25.0, 37.5])]
    (difference,) = differences = differences_of(rows)
    assert difference["task_drop"] == pytest.approx([-25.0, 12.5])
    assert difference["incidence_all"] == [-10.0, -10.0]
    (summary,) = summaries_of(differences)
    assert (summary["incidence_all_lower"], summary["task_drop_lower"]) == (2, 1)


@pytest.fixture
def committed():
    if not (COMMITTED / "mtl_experiment.json").exists():
        pytest.skip("the experiment was not run")
    return json.loads((COMMITTED / "mtl_experiment.json").read_text())


def test_committed_table_is_of_the_committed_runs(committed):
    rows = []
    for name, settings in committed["benches"].items():
        runs = [run for run in committed["runs"] if run["bench"] == name]
        final = [run for run in runs if run["seed"] != settings["search_seed"]]
        rates = choose_rates(BENCHES[name], [run for run in runs if run["seed"] == settings["search_seed"]])
        assert all(run["learning_rate"] == rates[run["method"], run["mask"], run["task"]] for run in final)
        rows += rows_of(BENCHES[name], final)
    assert rows == committed["rows"]
    assert differences_of(rows) == committed["differences"]
    assert summaries_of(committed["differences"]) == committed["summaries"]
    assert (COMMITTED / "mtl_experiment.md").read_text() == markdown(committed)


def test_the_documentation_prints_the_committed_tables(committed):
    page = (ROOT / "docs" / "reproduction.md").read_text()
    assert [line for line in markdown(committed).splitlines() if line.startswith("| ") and line not in page] == []
