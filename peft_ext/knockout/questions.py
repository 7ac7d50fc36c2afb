"""Questions about images, from GQA's published CSV files, other CSV files, or Hugging Face data sets."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any


# Long captions stand in one field.
csv.field_size_limit(10_000_000)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_OBJECTS = ("central object", "object1", "object2")


@dataclass
class Question:
    """
    Attributes:
        name (`str`): unique in the data set.
        text (`str`), answer (`str`): the question and the right answer.
        image (`Any`): a PIL image, or the path of one.
        true_option, false_option (`str`): what a choice offers; empty if it offers nothing.
        objects (`list[str]`): what the question is about.
        boxes (`list`): left, top, width and height of these objects, in pixels of the image.
        info (`dict`): more columns for the results.
    """

    name: str
    text: str
    answer: str
    image: Any
    true_option: str = ""
    false_option: str = ""
    objects: list[str] = field(default_factory=list)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)


def read_csv(path: str | os.PathLike[str], images: str | os.PathLike[str], limit: int | None = None) -> list[Question]:
    """
    Questions of a CSV file.

    Args:
        path (`str`): with the columns `question`, `answer` and `image` (a file name) or `img_id` (a file name without
            its ending), and optionally `question_id`, `true option`, `false option`, and for `central object`,
            `object1` and `object2`: `… name`, `… x`, `… y`, `… w`, `… h`.
        images (`str`): the folder of the images.
        limit (`int`, *optional*): how many rows to read.

    Raises:
        `ValueError`: naming the file, the line and what is missing.
        `FileNotFoundError`: if the file or the folder is not there.
    """
    path, folder = Path(path), Path(images)
    if not folder.is_dir():
        raise FileNotFoundError(f"images: {folder} is not a folder.")
    files = {file.name: file for file in folder.iterdir()}
    stems = {file.stem: file for file in sorted(files.values()) if file.suffix.lower() in _SUFFIXES}
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        missing = [name for name in ("question", "answer") if name not in columns]
        if "image" not in columns and "img_id" not in columns:
            missing.append("image (or img_id)")
        if missing:
            raise ValueError(
                f"{path} lacks the column(s) {', '.join(missing)}; it has {', '.join(columns) or 'none'}."
            )
        questions: list[Question] = []
        for row in islice(reader, limit):
            name = row.get("image") or row.get("img_id") or ""
            found = files.get(name) or stems.get(name)
            if found is None:
                raise ValueError(f"{path}, line {reader.line_num}: the image {name!r} is not in {folder}.")
            questions.append(_question(row, len(questions), found, f"{path}, line {reader.line_num}"))
    return _checked(questions, str(path))


def read_dataset(path: str, split: str, limit: int | None = None) -> list[Question]:
    """
    Questions of a data set with the columns `question`, `answer`, `image`, and optionally `question_id` (or `id`),
    `true_option`, `false_option`, `objects` (names) and `boxes` (left, top, width, height of each).

    Args:
        path (`str`): a folder that `save_to_disk` wrote, or what `load_dataset` takes.
        split (`str`): which part of it.
        limit (`int`, *optional*): how many rows to read.

    Raises:
        `ValueError`: naming what is missing.
    """
    import datasets

    loaded = datasets.load_from_disk(path) if os.path.isdir(path) and _saved(path) else datasets.load_dataset(path)
    if isinstance(loaded, Mapping):
        if split not in loaded:
            raise ValueError(f"split is {split!r}, but {path} has {', '.join(map(str, loaded))}.")
        loaded = loaded[split]
    missing = [name for name in ("question", "answer", "image") if name not in loaded.column_names]
    if missing:
        have = ", ".join(loaded.column_names)
        raise ValueError(f"{path} lacks the column(s) {', '.join(missing)}; it has {have}.")
    rows = enumerate(islice(loaded, limit))
    return _checked([_question(row, at, row["image"], f"{path}, row {at}") for at, row in rows], path)


def _saved(path: str) -> bool:
    return any(os.path.exists(os.path.join(path, name)) for name in ("dataset_info.json", "dataset_dict.json"))


def _question(row: Mapping[str, Any], number: int, image: Any, place: str) -> Question:
    for name in ("question", "answer"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"{place}: {name} is {row[name]!r}: must be text.")
    found = Question(
        name=str(row.get("question_id") or row.get("id") or number),
        text=row["question"].strip(),
        answer=row["answer"].strip(),
        image=image,
        true_option=_text(row, "true option", "true_option"),
        false_option=_text(row, "false option", "false_option"),
    )
    if "type_detailed" in row:
        found.info["type"] = row["type_detailed"]
    found.objects = [str(thing) for thing in row.get("objects") or []]
    found.boxes = [_numbers(box, place) for box in row.get("boxes") or []]
    for thing in _OBJECTS:
        label = _text(row, f"{thing} name")
        if label:
            found.objects.append(label)
            box = [row.get(f"{thing} {side}") for side in "xywh"]
            if all(_given(number) for number in box):
                found.boxes.append(_numbers(box, place))
    return found


def _text(row: Mapping[str, Any], *columns: str) -> str:
    value = next((row[column] for column in columns if row.get(column)), "")
    return str(value).strip() if _given(value) else ""


def _given(value: Any) -> bool:
    return value is not None and str(value).strip() not in ("", "-", "nan")


def _numbers(box: Any, place: str) -> tuple[float, float, float, float]:
    try:
        left, top, width, height = (float(number) for number in box)
    except (TypeError, ValueError):
        raise ValueError(f"{place}: {box!r} is not a box of four numbers.") from None
    return left, top, width, height


def _checked(questions: list[Question], place: str) -> list[Question]:
    if not questions:
        raise ValueError(f"{place} holds no question.")
    seen: set[str] = set()
    for question in questions:
        if question.name in seen:
            raise ValueError(f"{place}: the question id {question.name!r} comes twice.")
        seen.add(question.name)
    return questions


def open_image(image: Any) -> Any:
    """A PIL image in RGB."""
    from PIL import Image

    if isinstance(image, (str, os.PathLike)):
        with Image.open(image) as file:
            return file.convert("RGB")
    return image.convert("RGB")
