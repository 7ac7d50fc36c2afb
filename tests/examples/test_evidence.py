"""The whole of it on stand-ins: every method gets the same search, and an interrupted experiment goes on."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "mtl"))

import evidence
from _evidence import runs, workers
from _evidence.experiments import Plan, quick, with_stand_ins
from _quickstart.search import SPACING

from tests._processes import fork_server


QUICK = ["--quick", "--stand-ins", "--jobs", "1"]
COMPARED = ["--experiments", "neuroada-200", "gps-images"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("evidence")
    evidence.main([*QUICK, *COMPARED, "--out", str(out)])
    return out


def records(folder, name="comparisons"):
    return [json.loads(line) for line in (folder / f"runs_{name}.jsonl").read_text().splitlines()]


def test_every_method_has_the_same_search_and_the_same_seeds(folder):
    plan = with_stand_ins(quick(Plan()))
    for name in COMPARED[1:]:
        comparison = plan.comparison(name)
        for method in comparison.methods:
            mine = [r for r in records(folder) if (r["model"], r["method"]) == (comparison.model, method)]
            tried = sorted(r["learning_rate"] for r in mine if r["seed"] == runs.SEARCH_SEED)
            final = [r for r in mine if r["seed"] != runs.SEARCH_SEED]
            assert comparison.trials <= len(tried) <= comparison.trials + comparison.widenings
            assert all(b / a == pytest.approx(SPACING, rel=0.05) for a, b in pairwise(tried))
            assert [r["seed"] for r in final] == list(comparison.seeds)
            assert len({r["learning_rate"] for r in final}) == 1
            settings = {(r["steps"], r["batch_size"], r["size"], r["validation"], r["test"]) for r in mine}
            assert len(settings) == 1


def test_the_chosen_rate_is_the_best_tried_and_an_edge_was_widened_or_is_marked(folder):
    content = json.loads((folder / "evidence.json").read_text())
    for name in COMPARED[1:]:
        for row in content[name]["rows"]:
            best = max(row["trials"], key=lambda trial: (trial["accuracy"], -trial["loss"]))
            assert row["learning_rate"] == best["learning_rate"]
            assert row["edge"] is None or len(row["trials"]) == 4  # three, and one beyond


def test_the_report_says_what_the_runs_say(folder):
    content = json.loads((folder / "evidence.json").read_text())
    text = (folder / "evidence.md").read_text()
    for row in content["neuroada-200"]["rows"]:
        found = [
            r["test_result"]["accuracy"]
            for r in records(folder)
            if r["method"] == row["method"] and r["data"] == "stand-in:movies" and "test_result" in r
        ]
        assert row["accuracy"]["stand-in:movies"] == pytest.approx([100 * accuracy for accuracy in found])
        assert f"| {row['method']} |" in text


def test_an_interrupted_experiment_goes_on(folder, tmp_path, monkeypatch):
    lines = (folder / "runs_comparisons.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs_comparisons.jsonl").write_text("".join(lines[:-1]) + lines[-1][:30])  # cut off while writing
    trained = []

    def execute(run):
        trained.append(run)
        return json.loads(lines[-1])

    monkeypatch.setattr(runs, "execute", execute)
    evidence.main([*QUICK, *COMPARED, "--out", str(tmp_path)])
    assert [run.method for run in trained] == [json.loads(lines[-1])["method"]]
    assert (tmp_path / "evidence.md").read_text() == (folder / "evidence.md").read_text()


def test_some_methods_of_an_experiment(folder, tmp_path, capsys):
    (tmp_path / "runs_comparisons.jsonl").write_text((folder / "runs_comparisons.jsonl").read_text())
    evidence.main([*QUICK, "--experiments", "neuroada-200", "--methods", "probe", "full", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "evidence.json").read_text())
    assert [row["method"] for row in content["neuroada-200"]["rows"]] == ["probe", "full"]
    with pytest.raises(SystemExit):
        evidence.main([*QUICK, "--methods", "probe"])
    assert "--methods needs --model or --experiments" in capsys.readouterr().err


@pytest.mark.slow
def test_all_experiments_run_on_stand_ins_in_two_processes(tmp_path, monkeypatch):
    context = fork_server()
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda kind: context)
    evidence.main([*QUICK[:-1], "2", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "evidence.json").read_text())
    assert set(Plan().names) <= set(content)
    drift = {record["method"]: record["drift"][-1] for record in content["unmerging"]}
    assert drift["lora-r8"]["changed"] > 0
    assert drift["neuroada-k4"]["changed"] == drift["neuroada-k4"]["features"] == 0
    assert {row["mask"] for row in content["tasks"]["rows"]} == {"full", "psn", "random"}
    for record in content["merging"]:
        on_the_update = {"ties_svd", "dare_linear_svd"} if record["method"] == "lora-r8" else set()
        assert set(record["merged"]) == {"linear", "ties", "dare_linear"} | on_the_update


def test_a_model_and_a_table_of_ones_own(tmp_path):
    """A local folder and a file go through the same protocol as the packages' models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *(f"w{n}" for n in range(40))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(tmp_path / "model")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **size)).save_pretrained(tmp_path / "model")
    rows = [{"said": f"w{n % 40} w{n % 7}", "mood": "good" if n % 2 else "bad"} for n in range(1200)]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--model", str(tmp_path / "model"), "--data", f"{tmp_path}/table.jsonl:said:mood"]
    evidence.main(
        [
            *options,
            "--methods",
            "neuroada-k1",
            "probe",
            "--dtype",
            "bfloat16",
            "--quick",
            "--jobs",
            "1",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    content = json.loads((tmp_path / "out" / "evidence.json").read_text())
    assert [row["method"] for row in content["own"]["rows"]] == ["neuroada-k1", "probe"]


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--model", "x"], "--model and --data go together"), (["--jobs", "0"], "--jobs is 0")]
)
def test_wrong_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        evidence.main(arguments)
    assert message in capsys.readouterr().err
