"""Conversations about images: LLaVA's JSON layout and Hugging Face data sets, as batches with labels."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..extras import needs
from ..knockout.prompts.images import open_image
from .masking import IGNORED, Messages, encode
from .templates import IMAGE
from .tower import grey


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass
class Sample:
    """A conversation and its images, paths or pictures, in the order of their places in it."""

    messages: Messages
    images: list[Any]

    def question(self) -> Messages:
        """The messages before the first answer."""
        return list(takewhile(lambda message: message["role"] != "assistant", self.messages))

    def pictures(self) -> list[Image.Image]:
        """The images, opened, in RGB. Raises `ValueError` for one that cannot be read."""
        return [open_image(image) for image in self.images]


# ---------------------------------------------------------------------- layouts


def question_message(text: str, images: int) -> dict[str, Any]:
    """
    A user's message whose `<image>` are parts. A single image goes first, as in LLaVA-1.5; several keep their places.

    Raises:
        `ValueError`: if the text has another number of `<image>`, unless it has none.
    """
    places = text.count(IMAGE)
    if places not in (0, images):
        raise ValueError(f"it has {images} images, but {places} {IMAGE}: {text[:80]!r}")
    words = [piece.strip() for piece in text.split(IMAGE)]
    if places <= 1:
        words = ["", " ".join(word for word in words if word)] if images == 1 else [""] * images + words
    content: list[dict[str, str]] = []
    for number, word in enumerate(words):
        content += [{"type": "image"}] if number else []
        content += [{"type": "text", "text": word}] if word else []
    return {"role": "user", "content": content}


def from_turns(turns: list[dict[str, str]], images: list[Any]) -> Sample:
    """
    LLaVA's layout: turns with `from` and `value`.

    Raises:
        `ValueError`: if the turns are not of that layout, or do not name all images.
    """
    if not turns or not all(isinstance(turn, dict) and {"from", "value"} <= set(turn) for turn in turns):
        raise ValueError("`conversations` is not a list of turns with `from` and `value`")
    unknown = [turn["from"] for turn in turns if turn["from"] not in ROLES]
    if unknown:
        raise ValueError(f"a turn is from {unknown[0]!r}; known are {', '.join(ROLES)}")
    asked = [turn for turn in turns if ROLES[turn["from"]] == "user"]
    places = [turn["value"].count(IMAGE) for turn in asked]
    if not asked or ROLES[turns[-1]["from"]] != "assistant":
        raise ValueError("a conversation needs a human's turn and ends with an answer")
    if sum(places) not in (0, len(images)):
        raise ValueError(f"it has {len(images)} images, but {sum(places)} {IMAGE}")
    if sum(places) == 0:
        places[0] = len(images)
    counts = iter(places)
    messages = []
    for turn in turns:
        role = ROLES[turn["from"]]
        number = next(counts) if role == "user" else 0
        messages.append(
            question_message(turn["value"], number) if number else {"role": role, "content": turn["value"].strip()}
        )
    return Sample(messages, images)


def from_messages(messages: Messages, images: list[Any]) -> Sample:
    """The layout of TRL and of chat templates: messages with `role` and `content`, a string or parts."""
    cleaned: Messages = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            count = content.count(IMAGE)
            cleaned.append(question_message(content, count) if count else {**message, "content": content})
        else:
            parts = [{k: v for k, v in part.items() if v is not None and k in ("type", "text")} for part in content]
            cleaned.append({"role": message["role"], "content": parts})
    return Sample(cleaned, images)


def from_question(row: dict[str, Any]) -> Sample:
    """A question with one answer: choices become letters, of several answers the most frequent one is taken."""
    question, answer, choices = row["question"], row.get("answer", row.get("answers")), row.get("choices")
    if choices is not None and not isinstance(choices, str):
        question = with_choices(question, list(choices))
        answer = chr(ord("A") + answer) if isinstance(answer, int) else answer
    if isinstance(answer, list):
        words = [entry["answer"] if isinstance(entry, dict) else entry for entry in answer]
        answer = max(words, key=words.count) if words else None
    if answer is None:
        raise ValueError(f"the question has no answer: {question[:80]!r}")
    images = _images(row)
    return Sample(
        [
            question_message(question.replace(IMAGE, "").strip(), len(images)),
            {"role": "assistant", "content": str(answer)},
        ],
        images,
    )


def with_choices(question: str, choices: list[str]) -> str:
    """LLaVA-1.5's prompt for multiple choice."""
    lines = [f"{chr(ord('A') + number)}. {choice}" for number, choice in enumerate(choices)]
    return "\n".join([question, *lines, "Answer with the option's letter from the given choices directly."])


def _images(row: dict[str, Any]) -> list[Any]:
    found = row.get("images")
    if found is None:
        found = row.get("image", row.get("query_image"))
    if found is None:
        return []
    return list(found) if isinstance(found, list | tuple) else [found]


def sample_of(row: dict[str, Any]) -> Sample:
    """
    A row of any of the layouts: `conversations`, `messages`, or `question` and `answer`; with `image` or `images`.

    Raises:
        `ValueError`: if it is of none of them.
    """
    if row.get("conversations") is not None:
        turns = row["conversations"]
        return from_turns(json.loads(turns) if isinstance(turns, str) else turns, _images(row))
    if row.get("messages") is not None:
        return from_messages(row["messages"], _images(row))
    if row.get("question") is not None:
        return from_question(row)
    raise ValueError(
        f"a row has the columns {', '.join(row)}; needed are `conversations`, `messages`, or `question` and `answer`"
    )


# ---------------------------------------------------------------------- sources


def load_source(
    path: str,
    images: str | None = None,
    split: str = "train",
    streaming: bool = False,
    limit: int | None = None,
    image_tokens: int = 576,
) -> Any:
    """
    A data set to train on.

    Args:
        path (`str`): a JSON file in LLaVA's layout, or a Hugging Face data set (Hub id or folder).
        images (`str`, *optional*): folder of the images that a JSON file names, by default the file's own.
        split (`str`): of a Hugging Face data set.
        streaming (`bool`): whether a Hugging Face data set is read as it comes.
        limit (`int`, *optional*): use the first samples only.
        image_tokens (`int`): number of tokens of an image, for the column `length`, by which samples are grouped.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`.

    Raises:
        `ValueError`: if a file is not in LLaVA's layout or an image is missing, naming the entry.
    """
    with needs("trl"):
        from datasets import Dataset, load_dataset

    if not path.endswith(".json"):
        data = load_dataset(path, split=split, streaming=streaming)
        if streaming:
            return data if limit is None else data.take(limit)
        data = data if limit is None else data.select(range(min(limit, len(data))))
        return data if "length" in data.column_names else data.add_column("length", _lengths(data, image_tokens))
    rows = read_llava(Path(path), Path(images) if images is not None else Path(path).parent, limit)
    for row in rows:
        row["length"] = len(row["conversations"]) // 4 + len(row["images"]) * image_tokens
    return Dataset.from_list(rows)


def _lengths(data: Any, image_tokens: int) -> list[int]:
    """About how many tokens each row has, from its words alone: images are not opened."""
    known = ("conversations", "messages", "question")
    columns = [name for name in known if name in data.column_names]
    if not columns:
        sample_of(dict.fromkeys(data.column_names))  # says what is missing
    texts = (json.dumps(row, default=str) for row in data.select_columns(columns))
    return [len(t) // 4 + image_tokens * (t.count(IMAGE) + t.count('"type": "image"')) for t in texts]


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises `ValueError` if it is not there or no JSON."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def read_llava(path: Path, images: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """
    Rows of a file such as `llava_v1_5_mix665k.json`: `conversations` as JSON text and `images` as paths.

    Raises:
        `ValueError`: if an entry is of another layout or names an image that is not there.
    """
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} is not in LLaVA's layout, a list of entries with `conversations` and `image`.")
    rows = []
    for number, entry in enumerate(entries[:limit]):
        place = f"{path}, entry {number}"
        if not isinstance(entry, dict) or "conversations" not in entry:
            raise ValueError(f"{place} is not in LLaVA's layout: it has no `conversations`.")
        found = [str(images / name) for name in _images(entry)]
        try:
            from_turns(entry["conversations"], found)
        except ValueError as error:
            raise ValueError(f"{place}: {error}.") from error
        missing = [name for name in found if not Path(name).is_file()]
        if missing:
            raise ValueError(f"{place}: there is no image {missing[0]}; pass the images' folder as `images`.")
        rows.append({"conversations": json.dumps(entry["conversations"]), "images": found})
    return rows


# ---------------------------------------------------------------------- batches


class Collator:
    """
    Rows to what a Llava is trained on, padded on the right. Conversations of more than `max_length` tokens are cut at
    the end.
    """

    def __init__(self, processor: Any, max_length: int | None = None) -> None:
        self.processor, self.max_length = processor, max_length
        batch = processor(images=[grey()], text=[processor.image_token], add_special_tokens=False, return_tensors="pt")
        self.image_shape = batch["pixel_values"].shape[1:]
        self.image_tokens = int((batch["input_ids"] == processor.image_token_id).sum())
        self._warned = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        samples = [sample_of(row) for row in rows]
        pictures = [sample.pictures() for sample in samples]
        flat = [picture for some in pictures for picture in some]
        batch: dict[str, Tensor] = {}
        if flat:
            batch["pixel_values"] = self.processor.image_processor(images=flat, return_tensors="pt")["pixel_values"]
            if batch["pixel_values"].shape[1:] != self.image_shape:
                raise ValueError(
                    f"The image processor makes {tuple(batch['pixel_values'].shape[1:])} of some images and "
                    f"{tuple(self.image_shape)} of others; set its crop or its size."
                )
        encoded = [
            encode(self.processor, sample.messages, [self.image_tokens] * len(some), self.max_length)
            for sample, some in zip(samples, pictures, strict=True)
        ]
        if not self._warned and any(set(labels) == {IGNORED} for _, labels in encoded):
            self._warned = True
            warnings.warn(
                f"max_length={self.max_length} cuts all answers of some conversations, from which nothing is learned.",
                stacklevel=2,
            )
        length = max(len(ids) for ids, _ in encoded)
        pad = self.processor.tokenizer.pad_token_id
        batch["input_ids"] = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in encoded])
        batch["labels"] = torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in encoded])
        batch["attention_mask"] = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in encoded])
        return batch
