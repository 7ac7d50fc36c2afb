"""Questions about images, from GQA's published CSV files, other CSV files, or Hugging Face data sets."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from ...extras import needs
from .images import open_image


# Long captions stand in one field.
csv.field_size_limit(10_000_000)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_OBJECTS = ("central object", "object1", "object2")


@dataclass
class Question:
    """A question about an image."""

    name: str  # unique in the data set
    text: str  # the question
    answer: str  # the right answer
    image: Any  # a PIL image, the path of one, or `{"bytes": …, "path": …}`
    # What a choice offers; empty if it offers nothing
    true_option: str = ""
    false_option: str = ""
    objects: list[str] = field(default_factory=list)  # what the question is about
    # Left, top, width and height of these objects, in pixels of the image as it is shown
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)  # more columns for the results
    size: tuple[int, int] | None = None  # width and height of the image that the boxes were drawn on
    problem: str = ""  # why it cannot be asked; empty if it can

    def open_image(self) -> Any:
        """
        The image, see [`open_image`].

        Raises:
            `ValueError`: with the reason, if it cannot be had.
        """
        if self.problem:
            raise ValueError(self.problem)
        return open_image(self.image)


def read_csv(path: str | os.PathLike[str], images: str | os.PathLike[str], limit: int | None = None) -> list[Question]:
    """
    Questions of a CSV file.

    Args:
        path (`str`): with the columns `question`, `answer` and `image` (a file's path in the folder) or `img_id` (the
            same without its ending), and optionally `question_id` (otherwise rows are counted), `true option`,
            `false option`, `image_w` and `image_h` (the image's size), and for `central object`, `object1` and
            `object2`: `… name`, `… x`, `… y`, `… w`, `… h`.
        images (`str`): the folder of the images. A question whose image is not there has that as its `problem`.
        limit (`int`, *optional*): how many rows to read.

    Raises:
        `ValueError`: naming the file, the line and what is missing or malformed; or if none of the images is there.
        `FileNotFoundError`: if the file or the folder is not there.
    """
    path, folder = Path(path), Path(images)
    if not folder.is_dir():
        raise FileNotFoundError(f"images: {folder} is not a folder.")
    path_of = _finder(folder)
    questions: list[Question] = []
    for place, row in islice(_rows(path), limit):
        name = next((row[column].strip() for column in ("image", "img_id") if _given(row.get(column))), "")
        try:
            question = _question(row, len(questions), path_of(name), place)
        except (LookupError, OSError) as reason:
            question = _question(row, len(questions), None, place)
            question.problem = f"{place}: the image {name!r} {reason}"
        questions.append(question)
    if questions and all(question.problem for question in questions):
        raise ValueError(f"none of the {len(questions)} images is there; {questions[0].problem}.")
    return _checked(questions, str(path))


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV file, each with its place for errors."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte {error.object[error.start]:#x} is not UTF-8. Save the file as UTF-8, or "
            "convert it: iconv -f ENCODING -t UTF-8, where ENCODING is often cp1252 or utf-16."
        ) from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        columns = reader.fieldnames or []
        missing = [name for name in ("question", "answer") if name not in columns]
        if "image" not in columns and "img_id" not in columns:
            missing.append("image (or img_id)")
        if missing:
            raise ValueError(
                f"{path} lacks the column(s) {', '.join(missing)}; it has {', '.join(columns) or 'none'}."
            )
        repeated = [name for name, count in Counter(columns).items() if name and count > 1]
        if repeated:
            raise ValueError(f"{path} has the column(s) {', '.join(repeated)} twice: rename one.")
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row:
                raise ValueError(
                    f"{place} has more fields than there are columns: put quotes around text with commas."
                )
            yield place, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}.") from None


def _finder(folder: Path) -> Callable[[str], Path]:
    """A function from an image's name to its file, which raises `LookupError` with the reason."""

    @cache
    def stems(parent: Path) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for file in sorted(parent.iterdir()) if parent.is_dir() else ():
            if file.suffix.lower() in _SUFFIXES:
                found.setdefault(file.stem, []).append(file)
        return found

    def path_of(name: str) -> Path:
        path = Path(os.path.abspath(folder / name))
        if not name or not path.is_relative_to(os.path.abspath(folder)):
            raise LookupError(f"is not in {folder}")
        if os.path.isfile(path):
            return path
        files = stems(path.parent).get(path.name, [])
        if len(files) > 1:
            raise LookupError(f"could be {', '.join(file.name for file in files)} in {path.parent}: write its ending")
        if not files:
            raise LookupError(f"is not in {folder}")
        return files[0]

    return path_of


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
    with needs("trl"):
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
    loaded = loaded.with_format(None)
    if isinstance(loaded.features["image"], datasets.Image):
        # As it is in the file, so that an image that cannot be read is the fault of one question only.
        loaded = loaded.cast_column("image", datasets.Image(decode=False))
    rows = enumerate(islice(loaded, limit))
    return _checked([_question(row, at, row["image"], f"{path}, row {at}") for at, row in rows], path)


def _saved(path: str) -> bool:
    return any(os.path.exists(os.path.join(path, name)) for name in ("dataset_info.json", "dataset_dict.json"))


def _question(row: Mapping[str, Any], number: int, image: Any, place: str) -> Question:
    for name in ("question", "answer"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"{place}: {name} is {row[name]!r}: must be text.")
    found = Question(
        name=_name(row, number, place),
        text=row["question"].strip(),
        answer=row["answer"].strip(),
        image=image,
        true_option=_text(row, "true option", "true_option"),
        false_option=_text(row, "false option", "false_option"),
    )
    if "type_detailed" in row:
        found.info["type"] = row["type_detailed"]
    objects = row.get("objects")
    if objects is not None and not (_is_list(objects) and all(isinstance(thing, str) for thing in objects)):
        raise ValueError(
            f"{place}: objects is {objects!r}: must be a list of names (in a CSV file: object1 name, object2 name)."
        )
    boxes = row.get("boxes")
    if boxes is not None and not _is_list(boxes):
        raise ValueError(f"{place}: boxes is {boxes!r}: must be a list of boxes.")
    found.objects = list(objects or [])
    found.boxes = [_numbers(box, place) for box in boxes or []]
    for thing in _OBJECTS:
        label = _text(row, f"{thing} name")
        if label:
            found.objects.append(label)
            box = [row.get(f"{thing} {side}") for side in "xywh"]
            if any(_given(number) for number in box):
                found.boxes.append(_numbers(box, place))
    if found.boxes and _given(row.get("image_w")) and _given(row.get("image_h")):
        width, height = _numbers([row["image_w"], row["image_h"], 0, 0], place)[:2]
        found.size = int(width), int(height)
    return found


def _name(row: Mapping[str, Any], number: int, place: str) -> str:
    column = next((column for column in ("question_id", "id") if column in row), None)
    if column is None:
        return str(number)
    if not _given(row[column]):
        raise ValueError(f"{place}: {column} is {row[column]!r}: give each row one, or leave the column out.")
    return str(row[column]).strip()


def _text(row: Mapping[str, Any], *columns: str) -> str:
    return next((str(row[column]).strip() for column in columns if _given(row.get(column))), "")


def _given(value: Any) -> bool:
    return value is not None and str(value).strip() not in ("", "-", "nan")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


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
