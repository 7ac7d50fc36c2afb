"""Questions about images as lists of samples, from the shapes world or from files in the layouts of four data sets."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _shapes.world import PALETTE, ask, draw_scene, prompt, render
from PIL import Image


@dataclass
class Sample:
    """One question: `text` has `<image>` where the image stands, and ends where the answer begins."""

    image: Any
    text: str
    answer: str

    def picture(self) -> Image.Image:
        return Image.open(self.image).convert("RGB") if isinstance(self.image, (str, Path)) else self.image


def llava_prompt(question: str) -> str:
    """LLaVA-1.5's template."""
    return f"USER: <image>\n{question.replace('<image>', '').strip()} ASSISTANT:"


def shapes(number: int, seed: int, palette: dict[str, tuple[int, int, int]] = PALETTE) -> list[Sample]:
    """Random questions about random scenes."""
    generator = random.Random(seed)
    samples = []
    for _ in range(number):
        scene = draw_scene(generator)
        question = ask(scene, generator)
        image = Image.fromarray(render(scene, generator, palette))
        samples.append(Sample(image, prompt(question.text), question.answer))
    return samples


def llava_file(path: Path, images: Path, limit: int | None = None) -> list[Sample]:
    """
    LLaVA's instruction data (`llava_v1_5_mix665k.json`): the first round of each conversation that has an image.

    Raises:
        `ValueError`: if the file has another layout.
    """
    entries = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(entries, list) or not all(isinstance(e, dict) and "conversations" in e for e in entries):
        raise ValueError(f"{path} is not in LLaVA's layout, a list of entries with `conversations` and `image`.")
    samples = []
    for entry in entries:
        if "image" not in entry:
            continue
        turns = entry["conversations"]
        samples.append(Sample(images / entry["image"], llava_prompt(turns[0]["value"]), turns[1]["value"]))
        if limit is not None and len(samples) == limit:
            break
    return samples


def hub_dataset(name: str, split: str, limit: int | None = None) -> list[Sample]:
    """ScienceQA, VizWiz, IconQA or another data set with columns for an image, a question and an answer."""
    from datasets import load_dataset

    data = load_dataset(name, split=split)
    samples = []
    for row in data:
        sample = from_row(row)
        if sample is not None:
            samples.append(sample)
        if limit is not None and len(samples) == limit:
            break
    if not samples:
        raise ValueError(f"data={name!r}, split {split!r}: no row has an image, a question and an answer.")
    return samples


def from_row(row: dict[str, Any]) -> Sample | None:
    """A row of any of the three layouts: choices become letters, several answers the most frequent one."""
    image = row.get("image", row.get("query_image"))
    if image is None:
        return None
    question, answer = row.get("question"), row.get("answer", row.get("answers"))
    choices = row.get("choices")
    if choices is not None and not isinstance(choices, str):
        letters = [chr(ord("A") + number) for number in range(len(choices))]
        question += "\n" + "\n".join(f"{a}. {b}" for a, b in zip(letters, choices, strict=True))
        question += "\nAnswer with the option's letter from the given choices directly."
        answer = letters[answer] if isinstance(answer, int) else answer
    if isinstance(answer, list):
        words = [entry["answer"] if isinstance(entry, dict) else entry for entry in answer]
        answer = max(words, key=words.count) if words else None
    return None if question is None or answer is None else Sample(image, llava_prompt(question), str(answer))


class Collator:
    """Samples to what the model is trained on: labels are the answer and the end of the sequence."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, samples: list[Sample | dict[str, Sample]]) -> dict[str, torch.Tensor]:
        chosen = [sample["sample"] if isinstance(sample, dict) else sample for sample in samples]
        end = self.processor.tokenizer.eos_token
        images = [sample.picture() for sample in chosen]
        texts = [f"{sample.text} {sample.answer} {end}" for sample in chosen]
        batch = dict(
            self.processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt")
        )
        asked = self.processor(images=images, text=[sample.text for sample in chosen])["input_ids"]
        labels = batch["input_ids"].clone()
        for row, prompt_ids in zip(labels, asked, strict=True):
            row[: len(prompt_ids)] = -100
        labels[batch["attention_mask"] == 0] = -100
        return {**batch, "labels": labels}


def normalise(text: str) -> str:
    """For exact match: lower case, without punctuation at the ends and without repeated blanks."""
    return re.sub(r"\s+", " ", text).strip(" .,!?\n\t").lower()
