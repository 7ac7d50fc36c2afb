"""Benchmarks in their public layouts, in files that the tests make; scores by hand; generation in batches."""

import json

import pytest
from _shapes.parts import SHAPES, write_questions
from PIL import Image

from peft_ext.cli import main
from peft_ext.factory.benchmarks import BENCHMARKS
from peft_ext.factory.evaluate import generate, load_adapted, read_questions, table


def picture(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(folder / name)


def write(file, content):
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def people(*answers):
    return [{"answer": answer} for answer in answers]


def vqav2(folder):
    picture(folder, "COCO_val2014_000000000042.jpg")
    asked = [{"image_id": 42, "question": f"Is it {word}?", "question_id": n} for n, word in enumerate(("red", "on"))]
    said = [people(*["red"] * 10), people("1", "no", "no")]
    answers = [{"question_id": number, "answers": each} for number, each in enumerate(said)]
    write(folder / "annotations.json", {"annotations": answers})
    return (
        write(folder / "q.json", {"questions": asked, "data_subtype": "val2014"}),
        ["Red", "one"],
        {"accuracy": 100 * (1 + (2 * 1 / 3) / 3) / 2},
    )


def gqa(folder):
    picture(folder, "n1.jpg")
    content = {str(n): {"question": "Who?", "imageId": "n1", "answer": a} for n, a in enumerate(("man", "2"))}
    return write(folder / "q.json", content), ["The man.", "three"], {"accuracy": 50.0}


def textvqa(folder):
    picture(folder, "a.jpg")
    content = {"data": [{"question_id": 1, "image_id": "a", "question": "What?", "answers": ["stop"] * 10}]}
    return write(folder / "q.json", content), ["STOP"], {"accuracy": 100.0}


def vizwiz(folder):
    picture(folder, "v.jpg")
    content = [{"image": "v.jpg", "question": "What?", "answers": people(*["unanswerable"] * 10), "answerable": 0}]
    return write(folder / "q.json", content), ["Unanswerable"], {"accuracy": 100.0}


def scienceqa(folder):
    picture(folder, "test/1/image.png")
    base = {"question": "Which?", "choices": ["salt", "water"], "answer": 1, "hint": "Look.", "split": "test"}
    content = {"1": base | {"image": "image.png"}, "2": base | {"image": None}}
    content["3"] = base | {"image": "x", "split": "train"}
    return write(folder / "q.json", content), ["B. water"], {"accuracy": 100.0}


def pope(folder):
    picture(folder, "p.jpg")
    labels = ["yes", "yes", "no", "no"]
    base = {"image": "p.jpg", "text": "Is it?"}
    lines = [json.dumps(base | {"question_id": n, "label": label}) for n, label in enumerate(labels)]
    said = ["Yes", "No", "Yes, it is", "no"]
    expected = {"accuracy": 50.0, "F1": 50.0, "precision": 50.0, "recall": 50.0, "yes": 50.0}
    return write(folder / "coco_pope_random.json", "\n".join(lines)), said, expected


def mme(folder):
    root = folder / "mme"
    picture(root, "color/1.jpg", "color/2.jpg")
    for name in "12":
        write(root / "color" / f"{name}.txt", "Is it red? Please answer yes or no.\tYes\nIs it blue?\tNo\n")
    return root, ["Yes", "No", "yes", "yes"], {"score": 125.0, "color": 125.0}  # three of four, one image of two


def llava(folder):
    picture(folder, "l.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red"}]
    return write(folder / "q.json", [{"image": "l.png", "conversations": turns}]), ["red."], {"exact match": 100.0}


LAYOUTS = {each.__name__: each for each in (vqav2, gqa, textvqa, vizwiz, scienceqa, pope, mme, llava)}


@pytest.mark.parametrize("task", BENCHMARKS)
def test_layouts_and_scores(task, tmp_path):
    file, answers, expected = LAYOUTS[task](tmp_path)
    annotations = str(tmp_path / "annotations.json") if task == "vqav2" else None
    questions = read_questions(task, str(file), str(tmp_path), annotations, None)
    assert len(questions) == len(answers)
    assert BENCHMARKS[task][1](questions, answers) == pytest.approx(expected)


def test_prompts_are_llavas(tmp_path):
    file, _, _ = scienceqa(tmp_path)
    (question,) = read_questions("scienceqa", str(file), str(tmp_path), None, None)
    image, text = question.sample.messages[0]["content"]
    assert image == {"type": "image"} and text["text"] == (
        "Context: Look.\nWhich?\nA. salt\nB. water\nAnswer with the option's letter from the given choices directly."
    )
    file, _, _ = gqa(tmp_path)
    question = read_questions("gqa", str(file), str(tmp_path), None, 1)[0]
    assert question.sample.messages[0]["content"][1]["text"] == (
        "Who?\nAnswer the question using a single word or phrase."
    )


@pytest.mark.parametrize(
    "task, content, message",
    [
        ("gqa", [{"question": "Who?"}], "not in the layout of gqa"),
        ("gqa", {"1": {"question": "Who?", "imageId": "absent", "answer": "x"}}, r"there is no image .*absent.jpg"),
        ("textvqa", {"dta": []}, "has no `data`"),
        ("textvqa", {"data": []}, "has no questions of textvqa"),
        ("vizwiz", "{", "is no JSON"),
        ("pope", '{"image": "p.jpg"}', "line 1 is of another layout"),
        ("vqav2", {"questions": []}, "needs --annotations"),
        ("llava", [{"conversations": [{"from": "human", "value": "What?"}]}], "a conversation .* ends with an answer"),
        ("mme", {}, "is no folder"),
        ("okvqa", {}, "task='okvqa' is not known"),
    ],
)
def test_other_layouts_are_refused(task, content, message, tmp_path):
    file = write(tmp_path / "q.json", content)
    with pytest.raises(ValueError, match=message):
        read_questions(task, str(file), str(tmp_path), None, None)


def test_answers_in_batches_equal_answers_alone(composed_shapes, tmp_path):
    write_questions(tmp_path / "q.json", 7, 3)
    composed = load_adapted(str(composed_shapes / "composed"))
    whole = load_adapted(str(SHAPES))
    composed.model.model.multi_modal_projector.load_state_dict(whole.model.model.multi_modal_projector.state_dict())
    questions = read_questions("llava", str(tmp_path / "q.json"), None, None, None)
    samples = [question.sample for question in questions]
    together = generate(composed, samples, 4, 2)
    assert together == [generate(composed, [sample], 1, 2)[0] for sample in samples]
    right = BENCHMARKS["llava"][1](questions, together)["exact match"]
    assert right > 80  # the tiny model knows this world


def test_one_table_for_several_models():
    reports = {"a": {"questions": 2, "accuracy": 50.0, "lmar": [0.5, 1.5]}, "b": {"questions": 2, "accuracy": 75.0}}
    assert table(reports).splitlines()[2:] == ["| a | 2 | 50.0 | 1.000 |", "| b | 2 | 75.0 |  |"]


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    options = ["--model", "x", "--task", "pope", "--questions", str(tmp_path / "absent.json")]
    assert main(["llava", "evaluate", *options]) == 1
    assert "there is no file" in capsys.readouterr().err
