"""Positive control on the shapes world's checkpoint: knockouts find the route that the answer is known to take."""

import csv
import json
import random

import flow_shapes
import pytest
from _shapes.flow import changes, samples
from _shapes.world import CELL, ask, can_ask, draw_scene, render
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from peft_ext import cli
from peft_ext.knockout import cli as flow_cli
from peft_ext.knockout import layer_sweep, read_records
from tests.examples.conftest import EXAMPLES


CHECKPOINT = EXAMPLES / "shapes_llava"
PROMPT = "a chat about a picture . USER : <image> {question} ASSISTANT :"


@pytest.fixture(scope="module")
def loaded():
    return LlavaForConditionalGeneration.from_pretrained(CHECKPOINT).eval(), AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def records(loaded):
    model, processor = loaded
    drawn = [own for own, _, _ in samples(processor, 12, 3)]
    return layer_sweep(model, drawn, flow_shapes.PAIRS, window=3, progress=False)


@pytest.mark.parametrize("task", flow_shapes.TASKS)
def test_the_answer_goes_through_the_question(records, task):
    deepest = {pair: min(changes(records, pair, task).values()) for pair in flow_shapes.PAIRS}
    largest = {pair: max(abs(value) for value in changes(records, pair, task).values()) for pair in flow_shapes.PAIRS}
    assert deepest["image:question"] < -20 and deepest["question:last"] < -20
    assert largest["image:last"] < 5 and largest["last:last"] < 5
    assert deepest["related_patches:question"] < -20 and largest["other_patches:question"] < 5


def test_the_model_is_sure_of_its_answers(records):
    own = {record["sample"]: record["base_probability"] for record in records}
    assert sum(own.values()) / len(own) > 0.9 and {record["engine"] for record in records} == {"packed"}


def test_the_example_runs(tmp_path, capsys):
    assert flow_shapes.main(["--questions", "2", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "image → question" in printed and "ChooseRel" in printed
    names = {path.name for path in (tmp_path / "out").iterdir()}
    for figure in ("flow", "answer_by_layer", "jaccard", "related_patches", "flow_QueryAttr"):
        assert {f"{figure}.png", f"{figure}.csv"} <= names


@pytest.fixture
def gqa(tmp_path):
    """Questions in the columns of the published CSV files, and their images. The last one has a wrong answer."""
    generator = random.Random(5)
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for number in range(5):
        scene = draw_scene(generator)
        assert can_ask(scene, ("ChooseAttr",))
        question = ask(scene, generator, ("ChooseAttr",))
        Image.fromarray(render(scene, generator)).save(folder / f"{1000 + number}.png")
        thing = question.things[0]
        rows.append(
            {
                "question_id": f"0{number}",
                "img_id": 1000 + number,
                "question": question.text,
                "answer": question.answer.lower() if number < 4 else "purple",
                "true option": question.options[0],
                "false option": question.options[1],
                "central object name": thing.shape,
                "type_detailed": "chooseAttr",
                "central object w": CELL,
                "central object h": CELL,
                "central object x": thing.column * CELL,
                "central object y": thing.row * CELL,
            }
        )
    path = tmp_path / "questions.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path, folder, tmp_path / "out"


def flow(gqa, *more, out=None):
    path, folder, default = gqa
    arguments = ["--model", str(CHECKPOINT), "--data", str(path), "--images", str(folder), "--prompt", PROMPT]
    return cli.main(["flow", *arguments, "--out", str(out or default), "--device", "cpu", *more])


def test_the_command_reads_published_columns(gqa, capsys):
    pairs = "image:question,question:last,image:last,true_option:last,related_patches:question,question:objects"
    page = ["--report", str(gqa[2] / "page.html"), "--report-samples", "2", "--report-targets", "question,last"]
    assert flow(gqa, "--window", "3", "--pairs", pairs, "--answer-by-layer", "--jaccard", *page) == 0
    printed = capsys.readouterr().out
    assert "4 of 5 questions used" in printed and "image:question" in printed
    out = gqa[2]
    found = read_records(out / "sweep.jsonl")
    assert {record["sample"] for record in found} == {"00", "01", "02", "03"}
    assert len(found) == 4 * 6 * 6 and {record["type"] for record in found} == {"chooseAttr"}
    deepest = min(record["change_percent"] for record in found if record["pair"] == "related_patches:question")
    assert deepest < -20
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [entry["sample"] for entry in skipped] == ["04"] and "purple" in skipped[0]["reason"]
    for name in ("flow", "answer_by_layer", "jaccard"):
        assert (out / f"{name}.png").exists() and (out / f"{name}.csv").exists()
    shown = (out / "page.html").read_text()
    assert shown.count('"kind":"patch"') == 2 * 2 and shown.count('json" id="sample-') == 4 and "purple" in shown
    before = (out / "sweep.jsonl").read_bytes()
    assert flow(gqa, "--window", "3", "--pairs", pairs) == 0
    assert (out / "sweep.jsonl").read_bytes() == before


def test_the_command_reads_data_sets(gqa, tmp_path):
    datasets = pytest.importorskip("datasets")
    with gqa[0].open() as file:
        rows = list(csv.DictReader(file))
    columns = {
        "question": [row["question"] for row in rows],
        "answer": [row["answer"] for row in rows],
        "image": [Image.open(gqa[1] / f"{row['img_id']}.png") for row in rows],
        "question_id": [row["question_id"] for row in rows],
    }
    features = datasets.Features(
        {name: datasets.Image() if name == "image" else datasets.Value("string") for name in columns}
    )
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "set")
    arguments = ["--model", str(CHECKPOINT), "--dataset", str(tmp_path / "set"), "--prompt", PROMPT, "--window", "3"]
    assert cli.main(["flow", *arguments, "--out", str(gqa[2]), "--device", "cpu", "--limit", "2"]) == 0
    assert flow(gqa, "--window", "3", "--limit", "2", out=tmp_path / "other") == 0
    one, other = (read_records(folder / "sweep.jsonl") for folder in (gqa[2], tmp_path / "other"))
    assert [record["change_percent"] for record in one] == [record["change_percent"] for record in other]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs", "image"], "pairs holds 'image'"),
        (["--window", "0"], "window is 0"),
        (["--limit", "0"], "--limit is 0"),
        (["--device", "abacus"], "--device is 'abacus'"),
        (["--pairs", "image:captions"], "pairs holds the group 'captions'; there are image"),
        (["--pairs", "image:newline"], "no question of 5 could be used"),
        (["--prompt", "no question"], "must hold {question}"),
        (["--answer-token", "second"], "answer_token is 'second'"),
        (["--report", "page.pdf"], "--report is 'page.pdf'"),
        (["--report", "page.html", "--report-samples", "0"], "--report-samples is 0"),
        (["--report", "page.html", "--report-targets", "captions"], "the group 'captions'"),
    ],
)
def test_the_command_says_what_is_wrong(gqa, capsys, monkeypatch, loaded, options, message):
    monkeypatch.setattr(flow_cli, "_load", lambda options: (flow_cli._device(options.device), loaded)[1])
    assert flow(gqa, *options) == 1
    assert message in capsys.readouterr().err
    # what went wrong does not stand in the way of a second try
    assert not (gqa[2] / "sweep.jsonl").exists() or not (gqa[2] / "sweep.jsonl").read_text()


def test_results_of_something_else_are_not_continued(gqa, capsys, monkeypatch, loaded):
    monkeypatch.setattr(flow_cli, "_load", lambda options: loaded)
    assert flow(gqa, "--window", "3", "--limit", "1") == 0
    before = (gqa[2] / "sweep.jsonl").read_bytes()
    assert flow(gqa, "--window", "3", "--limit", "1", "--all-answers") == 1
    assert "holds results with --all-answers False, not True" in capsys.readouterr().err
    assert flow(gqa, "--window", "3", "--limit", "2") == 0
    assert (gqa[2] / "sweep.jsonl").read_bytes().startswith(before)
    (gqa[2] / "settings.json").write_text("")
    assert flow(gqa, "--window", "3", "--limit", "2") == 1
    assert "settings.json holds no settings of a sweep" in capsys.readouterr().err


def test_images_beyond_the_limit_need_not_be_there(gqa, monkeypatch, loaded):
    monkeypatch.setattr(flow_cli, "_load", lambda options: loaded)
    (gqa[1] / "1003.png").unlink()
    assert flow(gqa, "--window", "3", "--limit", "2") == 0


def test_bad_images_are_skipped_with_the_reason(gqa, capsys, monkeypatch, loaded):
    monkeypatch.setattr(flow_cli, "_load", lambda options: loaded)
    (gqa[1] / "1001.png").write_bytes(b"404")
    (gqa[1] / "1003.png").unlink()
    assert flow(gqa, "--window", "3", "--all-answers") == 0
    assert "3 of 5 questions used" in capsys.readouterr().out
    skipped = [json.loads(line) for line in (gqa[2] / "skipped.jsonl").read_text().splitlines()]
    assert [entry["sample"] for entry in skipped] == ["01", "03"]
    assert "cannot identify image" in skipped[0]["reason"] and "line 5: the image '1003'" in skipped[1]["reason"]
    # one that was used, and is gone when the sweep is continued
    (gqa[1] / "1000.png").unlink()
    assert flow(gqa, "--window", "3", "--all-answers", "--jaccard") == 0
    skipped = [json.loads(line) for line in (gqa[2] / "skipped.jsonl").read_text().splitlines()]
    assert skipped[-1]["sample"] == "00" and "no readouts: " in skipped[-1]["reason"]


def test_missing_files_and_columns_are_named(gqa, capsys, tmp_path):
    path, _, _ = gqa
    path.write_text("question,img_id\nwhat,1\n")
    assert flow(gqa) == 1 and "lacks the column(s) answer" in capsys.readouterr().err
    assert flow((path, tmp_path / "nowhere", gqa[2])) == 1 and "is not a folder" in capsys.readouterr().err
