"""Benchmarks from local files in their public layouts: questions, and how their answers are scored."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .answers import chosen_letter, exact_match, normalise_vqa, vqa_accuracy, yes_or_no
from .data import Sample, from_turns, question_message, read_json, read_llava, with_choices


SHORT = "\nAnswer the question using a single word or phrase."


@dataclass
class Question:
    """A question of a benchmark."""

    sample: Sample  # what the model is asked
    references: list[str]  # the right answer, or several people's
    group: str = ""  # what questions are scored together by: an image of MME, a part of POPE
    options: int = 0  # number of choices


Reader = Callable[[Path, Path, "Path | None"], list[Question]]
Scorer = Callable[[list[Question], list[str]], dict[str, float]]


def _question(image: Path, text: str, references: list[str], **more: Any) -> Question:
    if not image.is_file():
        raise ValueError(f"there is no image {image}; pass the images' folder with --images.")
    return Question(Sample([question_message(text, 1)], [str(image)]), references, **more)


def _read(path: Path, *keys: str) -> Any:
    """
    Raises:
        `ValueError`: if the file is not there, is no JSON, or lacks one of the keys.
    """
    content = read_json(path)
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            raise ValueError(f"{path} is of another layout: it has no `{key}`.")
    return content


# ---------------------------------------------------------------------- layouts


def vqav2(path: Path, images: Path, annotations: Path | None) -> list[Question]:
    """VQAv2: `v2_OpenEnded_mscoco_val2014_questions.json` and its annotations."""
    if annotations is None:
        raise ValueError("vqav2 needs --annotations, such as v2_mscoco_val2014_annotations.json.")
    answers = {
        entry["question_id"]: [answer["answer"] for answer in entry["answers"]]
        for entry in _read(annotations, "annotations")["annotations"]
    }
    content = _read(path, "questions")
    subtype = content.get("data_subtype", "val2014")
    questions = []
    for entry in content["questions"]:
        if entry["question_id"] not in answers:
            raise ValueError(f"{annotations} has no answers to question {entry['question_id']} of {path}.")
        image = images / f"COCO_{subtype}_{entry['image_id']:012d}.jpg"
        questions.append(_question(image, entry["question"] + SHORT, answers[entry["question_id"]]))
    return questions


def gqa(path: Path, images: Path, annotations: Path | None) -> list[Question]:
    """GQA: `testdev_balanced_questions.json`, questions by id."""
    return [
        _question(images / f"{entry['imageId']}.jpg", entry["question"] + SHORT, [entry["answer"]])
        for entry in _read(path).values()
    ]


def textvqa(path: Path, images: Path, annotations: Path | None) -> list[Question]:
    """TextVQA: `TextVQA_0.5.1_val.json`."""
    return [
        _question(images / f"{entry['image_id']}.jpg", entry["question"] + SHORT, entry["answers"])
        for entry in _read(path, "data")["data"]
    ]


def vizwiz(path: Path, images: Path, annotations: Path | None) -> list[Question]:
    """VizWiz: `val.json`, a list."""
    hint = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    return [
        _question(images / entry["image"], entry["question"] + hint + SHORT, [a["answer"] for a in entry["answers"]])
        for entry in _read(path)
    ]


def scienceqa(path: Path, images: Path, annotations: Path | None) -> list[Question]:
    """ScienceQA-IMG: the questions with an image of the test split, from `problems.json`."""
    questions = []
    for number, entry in _read(path).items():
        if entry.get("split", "test") != "test" or not entry.get("image"):
            continue
        context = f"Context: {entry['hint']}\n" if entry.get("hint") else ""
        places = [images / "test" / number / entry["image"], images / number / entry["image"]]
        image = next((place for place in places if place.is_file()), places[0])
        text = with_choices(context + entry["question"], entry["choices"])
        right = chr(ord("A") + entry["answer"])
        questions.append(_question(image, text, [right], options=len(entry["choices"])))
    return questions


def pope(path: Path, images: Path, annotations: Path | None) -> list[Question]:
    """POPE: `coco_pope_random.json` and its like, one JSON object a line; a folder has all three."""
    questions = []
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        if not file.is_file():
            raise ValueError(f"there is no file {file}.")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                entry = json.loads(line)
                image, text, label = images / entry["image"], entry["text"], entry["label"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {number} is of another layout ({error!r}).") from error
            questions.append(_question(image, text + SHORT, [label], group=file.stem))
    return questions


def mme(path: Path, images: Path, annotations: Path | None) -> list[Question]:
    """MME: a folder for each subtask, with pictures and texts of the same name; a line is question, tab, Yes or No."""
    if not path.is_dir():
        raise ValueError(f"{path} is no folder with MME's subtasks.")
    questions = []
    for file in sorted(path.glob("**/*.txt")):
        task = file.relative_to(path).parts[0]
        folders = [file.parent, file.parent.parent / "images"]
        image = next(
            (f / (file.stem + s) for f in folders for s in (".jpg", ".png") if (f / (file.stem + s)).is_file()), None
        )
        if image is None:
            raise ValueError(f"{file} has no picture of the same name.")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            text, tab, answer = line.rpartition("\t")
            if not tab:
                raise ValueError(f"{file}, line {number} is no question, tab and answer.")
            group = f"{task}\t{file}"
            questions.append(_question(image, text + SHORT.replace("\n", " "), [answer.strip()], group=group))
    return questions


def llava(path: Path, images: Path, annotations: Path | None) -> list[Question]:
    """LLaVA's own layout: the first question of each conversation, and its answer."""
    questions = []
    for row in read_llava(path, images):
        sample = from_turns(json.loads(row["conversations"]), row["images"])
        asked = sample.question()
        answer = sample.messages[len(asked)]["content"]
        questions.append(Question(Sample(asked, sample.images), [answer]))
    return questions


# ---------------------------------------------------------------------- scores


def _mean(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)


def _share(name: str, right: Callable[[str, Question], float]) -> Scorer:
    """A scorer that gives the mean of how right the answers are."""

    def score(questions: list[Question], answers: list[str]) -> dict[str, float]:
        return {name: _mean([right(a, q) for q, a in zip(questions, answers, strict=True)])}

    return score


score_vqa = _share("accuracy", lambda answer, question: vqa_accuracy(answer, question.references))
# One reference, normalised as VQA's.
score_gqa = _share("accuracy", lambda answer, question: normalise_vqa(answer) == normalise_vqa(question.references[0]))
score_exact = _share("exact match", lambda answer, question: exact_match(answer, question.references))
score_choice = _share(
    "accuracy", lambda answer, question: chosen_letter(answer, question.options) == question.references[0]
)


def score_pope(questions: list[Question], answers: list[str]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of `yes`, and the share of `yes`; F1 is the mean over POPE's parts."""
    said = [yes_or_no(answer) for answer in answers]
    pairs = [(s, q.references[0].strip().lower(), q.group) for q, s in zip(questions, said, strict=True)]

    def f1(some: list[tuple[str, str, str]]) -> tuple[float, float, float]:
        hits = sum(s == "yes" == t for s, t, _ in some)
        precision = hits / max(1, sum(s == "yes" for s, _, _ in some))
        recall = hits / max(1, sum(t == "yes" for _, t, _ in some))
        return 100 * precision, 100 * recall, 200 * precision * recall / max(precision + recall, 1e-12)

    groups = sorted({group for _, _, group in pairs})
    precision, recall, _ = f1(pairs)
    by_group = [f1([pair for pair in pairs if pair[2] == group])[2] for group in groups]
    return {
        "accuracy": _mean([s == t for s, t, _ in pairs]),
        "F1": sum(by_group) / len(by_group),
        "precision": precision,
        "recall": recall,
        "yes": _mean([s == "yes" for s in said]),
    }


def score_mme(questions: list[Question], answers: list[str]) -> dict[str, float]:
    """Per subtask: accuracy plus accuracy+ (both of an image's questions right), at most 200; and their sum."""
    tasks: dict[str, dict[str, list[bool]]] = {}
    for question, answer in zip(questions, answers, strict=True):
        task, image = question.group.split("\t")
        right = yes_or_no(answer) == question.references[0].lower()
        tasks.setdefault(task, {}).setdefault(image, []).append(right)
    scores = {
        task: _mean([right for some in by_image.values() for right in some])
        + _mean([all(some) for some in by_image.values()])
        for task, by_image in tasks.items()
    }
    return {"score": sum(scores.values()), **scores}


BENCHMARKS: dict[str, tuple[Reader, Scorer]] = {
    "vqav2": (vqav2, score_vqa),
    "gqa": (gqa, score_gqa),
    "textvqa": (textvqa, score_vqa),
    "vizwiz": (vizwiz, score_vqa),
    "scienceqa": (scienceqa, score_choice),
    "pope": (pope, score_pope),
    "mme": (mme, score_mme),
    "llava": (llava, score_exact),
}
