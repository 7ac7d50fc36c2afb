"""Questions of real data: one that cannot be asked is skipped with the reason, and a malformed file is named."""

import argparse
import csv
import json
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from peft_ext.knockout import LazySample, cli, layer_sweep, read_records
from peft_ext.knockout.ask import Asker, _plain
from peft_ext.knockout.prompts.questions import Question, read_csv, read_dataset

from . import _processors as make
from .test_images import nasty_files, picture, saved


PROMPT = "USER: <image>\n{question} ASSISTANT:"
PAIRS = ["image:last", "question:last"]
TEXT = "Is the table red or green?"


def asker(groups=("image", "question", "last"), **options):
    processor = make.llava()
    model = make.local_model(processor)
    return Asker(model, processor, groups, prompt=PROMPT, **{"only_correct": False, "max_new_tokens": 2} | options)


def table(folder, *rows, columns=("question_id", "image", "question", "answer")):
    """A CSV file, and the folder beside it."""
    with (folder / "questions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return folder / "questions.csv", folder


def sweep(own, questions, output):
    lazy = [LazySample(question.name, lambda q=question: own.sample(q)) for question in questions]
    layer_sweep(own.model, lazy, PAIRS, engine="full", output=output, progress=False)
    return list(dict.fromkeys(record["sample"] for record in read_records(output)))


def test_a_folder_of_nasty_files_ends_no_sweep(tmp_path):
    """Between two good images stand all the bad ones; each is skipped with its reason."""
    reasons = nasty_files(tmp_path)
    for name in ("first.png", "last.png"):
        picture().save(tmp_path / name)
    Image.fromarray(np.zeros((1, 900, 3), np.uint8)).save(tmp_path / "thin.png")
    names = ["first.png", *reasons, "thin.png", "last.png"]
    questions = read_csv(*table(tmp_path, *[(name, name, TEXT, "red") for name in names]))
    own = asker()
    assert sweep(own, questions, tmp_path / "out.jsonl") == ["first.png", "thin.png", "last.png"]
    reasons |= dict.fromkeys(["folder.png", "pipe.png", "to_nowhere.png", "missing.png"], f"is not in {tmp_path}")
    assert [name for name, _ in own.skipped] == list(reasons)
    for name, reason in own.skipped:
        assert name in reason and reasons[name] in reason


def test_a_data_set_s_bad_image_is_skipped(tmp_path):
    datasets = pytest.importorskip("datasets")
    good = saved(picture(), "PNG")
    rows = {
        "question": [TEXT] * 4,
        "answer": ["red"] * 4,
        "question_id": [0, 1, 2, 3],
        "image": [good, {"bytes": good["bytes"][:60], "path": "cut.png"}, None, good],
    }
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.save_to_disk(tmp_path / "set")
    own = asker()
    assert sweep(own, read_dataset(str(tmp_path / "set"), "train"), tmp_path / "out.jsonl") == ["0", "3"]
    assert [name for name, _ in own.skipped] == ["1", "2"]


def test_what_a_processor_does_not_take_is_skipped(monkeypatch):
    own = asker()

    def raising(*_, **__):
        raise ZeroDivisionError("no height")

    monkeypatch.setattr(type(own.processor), "__call__", raising)
    assert own.sample(Question("a", TEXT, "red", picture())) is None
    assert own.skipped[0][0] == "a" and "ZeroDivisionError: no height" in own.skipped[0][1]


def test_an_answer_without_the_token_that_is_read_is_skipped():
    own = asker(answer_token=7)
    assert own.sample(Question("a", TEXT, "red", picture())) is None
    assert "has no token 7, counted from 0" in own.skipped[0][1]


def test_boxes_of_another_size_are_not_used():
    """Resized images would get the patches of something else."""
    question = Question("a", TEXT, "red", picture().resize((32, 32)), boxes=[(0, 0, 8, 8)], size=(64, 64))
    own = asker()
    assert own.sample(question) is not None
    own = asker(("related_patches", "last"))
    assert own.sample(question) is None and "boxes are for an image of (64, 64) pixels" in own.skipped[0][1]
    question.size = (32, 32)
    assert own.sample(question) is not None


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_spellings_of_question_and_option_may_differ(forms):
    text = unicodedata.normalize(forms[0], "Is it a café's table or a bed?")
    question = Question("a", text, "bed", picture(), unicodedata.normalize(forms[1], "café"), "bed")
    own = asker(("true_option", "last"))
    sample = own.sample(question)
    token = own.processor.tokenizer.decode(sample.inputs["input_ids"][sample.groups["true_option"]])
    assert unicodedata.normalize("NFC", token).strip().startswith("café")


@pytest.mark.parametrize(
    ("said", "gold", "same"),
    [
        ("Caf\u00e9.", "cafe\u0301", True),
        ("“Red”", "red", True),
        ("t-shirt", "T-Shirt", True),
        ("\uff21。", "a", True),
        ("straße", "STRASSE", True),
        ("3.5", "35", False),
        ("-5", "5", False),
        ("1,000", "1000", True),
        ("?", "!", False),
        ("👍", "👎", False),
    ],
)
def test_answers_are_compared_without_case_and_punctuation(said, gold, same):
    assert (_plain(said) == _plain(gold)) == same


def test_a_wrong_answer_that_looks_alike_is_shown_with_escapes(monkeypatch):
    own = asker(only_correct=True)
    monkeypatch.setattr(own, "answer", lambda inputs: ([5], "r\u0435d"))  # a Cyrillic letter
    assert own.sample(Question("a", TEXT, "red", picture())) is None
    assert own.skipped == [("a", "the model answers 'r\u0435d' ('r\\u0435d') instead of 'red'")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.png", "a.png"),
        ("a", "a.png"),
        ("sub/b.png", "sub/b.png"),
        ("sub/b", "sub/b.png"),
        ("./sub/../a.png", "a.png"),
        ("c", "c.JPG"),
        ("d.e", "d.e.png"),
        ("same.png", "same.png"),
        ("same", "could be same.jpg, same.png"),
        ("sub", "is not in"),
        ("nowhere/a.png", "is not in"),
        ("../a.png", "is not in"),
        ("/etc/hostname", "is not in"),
        ("", "is not in"),
        ("x" * 300, "is not in"),
    ],
)
@pytest.mark.parametrize("relative", [False, True])
def test_images_are_found_by_name(tmp_path, monkeypatch, name, expected, relative):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for file in ("a.png", "sub/b.png", "c.JPG", "d.e.png", "same.png", "same.jpg", "../a.png"):
        (folder / file).touch()
    path, _ = table(tmp_path, (1, name, TEXT, "red"), (2, "a.png", TEXT, "red"))
    monkeypatch.chdir(folder)
    question = read_csv(path, "." if relative else folder)[0]
    if question.problem:
        assert expected in question.problem and "line 2" in question.problem
    else:
        assert question.image == folder / expected


def test_a_folder_without_any_of_the_images_is_an_error_at_once(tmp_path):
    (tmp_path / "images").mkdir()
    path, _ = table(tmp_path, (1, "a.png", TEXT, "red"), (2, "b.png", TEXT, "red"))
    with pytest.raises(ValueError, match=r"none of the 2 images is there; .*line 2: the image 'a.png' is not in"):
        read_csv(path, tmp_path / "images")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("question,answer,img_id\nWhat?,a,1\nCaf\u00e9?,b,1\n".encode("cp1252"), "line 3: byte 0xe9 is not UTF-8"),
        ("question,answer,img_id\n".encode("utf-16"), "line 1: byte 0xff is not UTF-8. Save the file as UTF-8"),
        (b"question,answer,img_id\nIs it red, or green?,red,1\n", "line 2 has more fields than there are columns"),
        (b"question,answer,img_id,answer\nWhat?,a,1,b\n", r"the column\(s\) answer twice"),
        (b"question,answer,img_id\n" + b'"' + b"x" * 10_000_001, "field larger than field limit"),
        (b"question_id,question,answer,img_id\n1,What?,a,1\n,What?,a,1\n", "line 3: question_id is '': give each row"),
        (b"question_id,question,answer,img_id\n1,What?,a,1\n1,What?,a,1\n", "the question id '1' comes twice"),
        (b"question,answer,img_id,objects\nWhat?,a,1,bed\n", "line 2: objects is 'bed': must be a list of names"),
        (b"question,answer,img_id,object1 name,object1 x\nWhat?,a,1,bed,3\n", "is not a box of four numbers"),
        (b"question,answer,img_id\nWhat?,a\n", "none of the 1 images is there"),
        (b"question,answer,img_id\n", "holds no question"),
    ],
)
def test_malformed_tables_are_named(tmp_path, content, message):
    (tmp_path / "1.png").touch()
    (tmp_path / "questions.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_csv(tmp_path / "questions.csv", tmp_path)


def test_tables_of_other_programs_are_read(tmp_path):
    """With a mark of byte order, other line ends, a comma too many in the header, and line ends inside a field."""
    (tmp_path / "1.png").touch()
    text = 'question,answer,img_id,,\r\n"What,\r\nis ""it""?",caf\u00e9,1,,\r\n'
    (tmp_path / "questions.csv").write_bytes(text.encode("utf-8-sig"))
    (question,) = read_csv(tmp_path / "questions.csv", tmp_path)
    assert (question.name, question.text, question.answer) == ("0", 'What,\r\nis "it"?', "caf\u00e9")


def test_zero_is_an_id_and_an_option(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {
        "question": [TEXT] * 2,
        "answer": ["red"] * 2,
        "image": ["a.png"] * 2,
        "true_option": [0, 1],
        "false_option": [1, 0],
    }
    made = datasets.Dataset.from_dict(columns | {"question_id": [7, 0]})
    made.save_to_disk(tmp_path / "set")
    found = read_dataset(str(tmp_path / "set"), "train")
    assert [question.name for question in found] == ["7", "0"]
    assert [(question.true_option, question.false_option) for question in found] == [("0", "1"), ("1", "0")]
    datasets.Dataset.from_dict(columns | {"question_id": [1, None]}).save_to_disk(tmp_path / "lacking")
    with pytest.raises(ValueError, match="row 1: question_id is None: give each row one"):
        read_dataset(str(tmp_path / "lacking"), "train")


def test_readouts_are_of_the_answer_s_first_token_whichever_was_swept(tmp_path, monkeypatch):
    """The first begins with a space and the last does not; the words that are read have to be like the first."""
    own, question = asker(), Question("a", TEXT, "red", picture())
    spoken = [own.processor.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in (" red", "color")]
    assert own.words(question, spoken[0]) != own.words(question, spoken[1])
    monkeypatch.setattr(own, "answer", lambda inputs: (spoken, "redcolor"))
    options = argparse.Namespace(
        answer_token="last", answer_by_layer=True, no_final_norm=False, jaccard=False, out=tmp_path
    )
    assert cli._readouts(options, own, [question], [{"sample": "a", "answer_id": spoken[1]}]) == []
    found = [json.loads(line) for line in (tmp_path / "answer_by_layer.jsonl").read_text().splitlines()]
    assert {record["word"]: record["token_id"] for record in found} == own.words(question, spoken[0])


def test_an_answer_without_probability_ends_the_sweep_loudly():
    own = asker()
    sample = own.sample(Question("a", TEXT, "red", picture()))
    with torch.no_grad():
        own.model.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="sample a: the model's logits are not finite"):
        layer_sweep(own.model, sample, PAIRS, engine="full", progress=False)


def test_a_generator_that_was_read_before_is_refused():
    with pytest.raises(ValueError, match="samples is empty"):
        layer_sweep(asker().model, iter(()), PAIRS, engine="full", progress=False)
