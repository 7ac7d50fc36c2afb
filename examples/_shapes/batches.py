"""Batches of conversations about scenes, made faster than a processor makes them and equal to its output."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaProcessor

from .processing import IMAGE_TOKENS
from .world import PALETTE, TASKS, Question, Scene, ask, can_ask, draw_scene, prompt, render


class Batches:
    """
    Draws scenes, questions and their tokens.

    Args:
        processor (`LlavaProcessor`): whose tokens and normalisation are used.
        seed (`int`): of everything drawn.
        palette (`dict`): the colours that the picture shows.
        rename (`dict[str, str]`): answers that are replaced by others.
    """

    def __init__(
        self,
        processor: LlavaProcessor,
        seed: int,
        palette: dict[str, tuple[int, int, int]] = PALETTE,
        rename: dict[str, str] | None = None,
    ) -> None:
        self.generator = random.Random(seed)
        self.vocabulary = processor.tokenizer.get_vocab()
        self.mean, self.std = processor.image_processor.image_mean, processor.image_processor.image_std
        self.palette, self.rename = palette, rename or {}

    def encode(self, text: str) -> list[int]:
        """Token numbers, with each `<image>` repeated once per patch."""
        tokens: list[int] = []
        for word in text.split():
            tokens += [self.vocabulary[word]] * (IMAGE_TOKENS if word == "<image>" else 1)
        return tokens

    def pixels(self, scenes: list[Scene]) -> Tensor:
        """fp32 `[scenes, 3, SIZE, SIZE]`."""
        pictures = np.stack([render(scene, self.generator, self.palette) for scene in scenes]).astype(np.float32)
        normal = (pictures / 255 - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return torch.from_numpy(normal.astype(np.float32)).permute(0, 3, 1, 2).contiguous()

    def answer(self, question: Question) -> str:
        return self.rename.get(question.answer, question.answer)

    def conversations(self, number: int, turns: int, tasks: tuple[str, ...] = tuple(TASKS)) -> dict[str, Tensor]:
        """Scenes with `turns` questions each, for training: the labels are the answers and the ends of turns."""
        scenes = [draw_scene(self.generator) for _ in range(number)]
        rows, labels = [], []
        for scene in scenes:
            row: list[int] = []
            wanted: list[int] = []
            for turn in range(turns):
                question = ask(scene, self.generator, tasks)
                text = f"<s> {prompt(question.text)}" if turn == 0 else f"USER : {question.text} ASSISTANT :"
                asked, answered = self.encode(text), self.encode(f"{self.answer(question)} </s>")
                row += asked + answered
                wanted += [-100] * len(asked) + answered
            rows.append(row)
            labels.append(wanted)
        length = max(map(len, rows))
        ids = torch.tensor([row + [self.vocabulary["<pad>"]] * (length - len(row)) for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
            "labels": torch.tensor([wanted + [-100] * (length - len(wanted)) for wanted in labels]),
            "pixel_values": self.pixels(scenes),
        }

    def questions(
        self, number: int, tasks: tuple[str, ...] = tuple(TASKS)
    ) -> tuple[dict[str, Tensor], list[Question]]:
        """Scenes with one question each, for evaluation: prompts padded on the left, and the questions."""
        scenes: list[Scene] = []
        while len(scenes) < number:
            scene = draw_scene(self.generator)
            if can_ask(scene, tasks):
                scenes.append(scene)
        questions = [ask(scene, self.generator, tasks) for scene in scenes]
        rows = [self.encode(f"<s> {prompt(question.text)}") for question in questions]
        length = max(map(len, rows))
        pads = [length - len(row) for row in rows]
        ids = [[self.vocabulary["<pad>"]] * pad + row for pad, row in zip(pads, rows, strict=True)]
        batch = {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(pads, rows, strict=True)]),
            "pixel_values": self.pixels(scenes),
        }
        return batch, questions


@torch.no_grad()
def accuracy(model: Any, batches: Batches, number: int, tasks: tuple[str, ...], size: int = 128) -> float:
    """The share of questions whose first output token is the right answer (all answers are one token)."""
    right = 0
    for start in range(0, number, size):
        batch, questions = batches.questions(min(size, number - start), tasks)
        output = model(**batch, position_ids=positions(batch["attention_mask"]), logits_to_keep=1)
        said = output.logits[:, -1].argmax(dim=-1).tolist()
        right += sum(a == batches.vocabulary[batches.answer(q)] for a, q in zip(said, questions, strict=True))
    return right / number


def positions(attention_mask: Tensor) -> Tensor:
    """Position numbers that do not count padding, `[batch, tokens]`."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
