"""From a question to a sample of a sweep: prompt, inputs, the model's answer, token groups."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .prompts.phrases import quoted
from .prompts.questions import Question
from .prompts.samples import FlowSample
from .prompts.token_groups import GROUPS, find_token_groups
from .read.lens import answer_tokens


# Groups that are looked for in the text, by the part of the question that they need.
_OPTIONS = ("true_option", "false_option", "options", "question_without_options")
_OBJECTS = ("objects", "question_without_objects")
_PATCHES = ("related_patches", "other_patches")
_PROMPT = '"USER: <image>\\n{question} ASSISTANT:"'


def check_groups(names: Iterable[str]) -> None:
    """Raises `ValueError` for names of groups that are not found in questions."""
    for name in names:
        if name not in GROUPS:
            raise ValueError(f"pairs holds the group {name!r}; there are {', '.join(GROUPS)}.")


@dataclass(eq=False)
class Asker:
    """
    Asks a model questions about images, and finds what a sweep needs.

    Args:
        model (`torch.nn.Module`), processor (`ProcessorMixin`): a vision-language model.
        groups (`Sequence[str]`): names of the groups that are needed, so that no others are looked for.
        prompt (`str`, *optional*): with `{question}` and the image's placeholder in it; by default the processor's
            chat template.
        suffix (`str`, *optional*): what follows the question inside the chat template.
        image_options (`dict`, *optional*): for the processor, such as `do_pad=True`.
        only_correct (`bool`): leave out questions that the model does not answer as it should, as the thesis does.
        max_new_tokens (`int`): of an answer.
        answer_token (`str` or `int`): of [`layer_sweep`]; leave out questions whose answer has no such token.

    Raises:
        `ValueError`: if there is no prompt to ask with, or no group of such a name.
    """

    model: nn.Module
    processor: Any
    groups: Collection[str]
    prompt: str | None = None
    suffix: str = ""
    image_options: Mapping[str, Any] = field(default_factory=dict)
    only_correct: bool = True
    max_new_tokens: int = 16
    answer_token: str | int = "first"
    skipped: list[tuple[str, str]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.prompt is not None and "{question}" not in self.prompt:
            raise ValueError(f"prompt is {self.prompt!r}: must hold {{question}}, such as {_PROMPT}.")
        if self.prompt is None and not getattr(self.processor, "chat_template", None):
            kind = type(self.processor).__name__
            raise ValueError(f"{kind} has no chat template; give a prompt, such as {_PROMPT}.")
        check_groups(self.groups)

    def sample(self, question: Question) -> FlowSample | None:
        """The sample, or `None`, with the reason in `skipped`, whatever is wrong with the question or its image."""
        try:
            return self._sample(question)
        except (ValueError, torch.OutOfMemoryError, MemoryError) as error:
            self.skipped.append((question.name, str(error) or type(error).__name__))
            return None

    def _sample(self, question: Question) -> FlowSample:
        inputs, groups = self.ready(question)
        spoken, text = self.answer(inputs)
        if not spoken:
            raise ValueError("the model says nothing")
        if self.only_correct and _plain(text) != _plain(question.answer):
            raise ValueError(f"the model answers {quoted(text)} instead of {quoted(question.answer)}")
        if isinstance(self.answer_token, int) and self.answer_token >= len(spoken):
            raise ValueError(f"the answer {quoted(text)} has no token {self.answer_token}, counted from 0")
        return FlowSample(inputs, groups, [spoken], [question.name], {"answer": text, **question.info})

    def ready(self, question: Question) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Inputs of the model for a question, with their token groups. Raises `ValueError` with the reason."""
        image = question.open_image()
        try:
            inputs = self.inputs(question, image)
        except Exception as error:  # processors raise various things for images of odd shapes
            kind = type(self.processor).__name__
            raise ValueError(f"{kind} does not take it: {type(error).__name__}: {error}") from error
        return inputs, self.find(question, inputs, image)

    def inputs(self, question: Question, image: Any) -> dict[str, Any]:
        """Inputs of the model for a question about an image."""
        if self.prompt is not None:
            text = self.prompt.replace("{question}", question.text)
        else:
            content = [{"type": "image"}, {"type": "text", "text": question.text + self.suffix}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        begin = getattr(self.processor.tokenizer, "bos_token", None)
        # A chat template may begin with what the tokenizer adds too.
        more = {"add_special_tokens": False} if begin and text.startswith(begin) else {}
        made = self.processor(images=[image], text=[text], return_tensors="pt", **more, **self.image_options)
        device = next(self.model.parameters()).device
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in made.items()}

    @torch.no_grad()
    def answer(self, inputs: dict[str, Any]) -> tuple[list[int], str]:
        """The model's answer: its tokens up to the end, and its text."""
        model: Any = self.model
        made = model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        spoken = made[0, inputs["input_ids"].shape[1] :].tolist()
        ends = model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        stop = next((at for at, token in enumerate(spoken) if token in ends), len(spoken))
        tokenizer = self.processor.tokenizer
        return spoken[:stop], tokenizer.decode(spoken[:stop], skip_special_tokens=True).strip()

    def words(self, question: Question, first: int) -> dict[str, int]:
        """First tokens of the answer's two spellings and of the false option, by name."""
        others = {"false option": question.false_option} if question.false_option else {}
        return answer_tokens(self.processor.tokenizer, question.answer, first, **others)

    def find(self, question: Question, inputs: dict[str, Any], image: Any) -> dict[str, Tensor]:
        """The token groups of a question. Raises `ValueError` if one that is needed cannot be found."""
        needed = set(self.groups)
        spans: dict[str, Any] = {"question": question.text}
        if needed & set(_OPTIONS):
            if not (question.true_option and question.false_option):
                raise ValueError("the question has no options")
            spans |= {"true_option": question.true_option, "false_option": question.false_option}
        if needed & set(_OBJECTS):
            if not question.objects:
                raise ValueError("the question names no objects")
            spans["objects"] = question.objects
        boxes = question.boxes if needed & set(_PATCHES) else None
        if boxes is not None and not boxes:
            raise ValueError("the question has no boxes")
        if boxes and question.size not in (None, image.size):
            raise ValueError(f"its boxes are for an image of {question.size} pixels, but the image has {image.size}")
        groups = find_token_groups(
            self.processor, inputs, image=image, spans=spans, boxes=boxes, image_options=self.image_options
        )
        lacking = needed - set(groups)
        if lacking:
            raise ValueError(
                f"no token is in the group(s) {', '.join(sorted(lacking))}; there are {', '.join(groups)}"
            )
        return groups


def _plain(text: str) -> str:
    """An answer without case and punctuation, of numbers all but point and minus; as it is if that is all of it."""
    text = unicodedata.normalize("NFKC", text).casefold()
    kept = [
        character
        for before, character, after in zip(" " + text, text, text[1:] + " ", strict=False)
        if not _is_punctuation(character) or (character in ".-" and after.isdigit() and not before.isalpha())
    ]
    return " ".join("".join(kept).split()) or text.strip()


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")
