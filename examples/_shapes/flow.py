"""Questions about scenes as samples of a sweep, and what is shown of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from PIL import Image
from tqdm import tqdm

from peft_ext.knockout import (
    FlowSample,
    answer_probability_by_layer,
    answer_tokens,
    find_token_groups,
    sample_view,
    topk_jaccard,
)

from .world import CELL, Question, ask, can_ask, draw_scene, prompt, render


TASKS = ("ChooseAttr", "ChooseCat", "ChooseRel", "QueryAttr")


def sample(processor: Any, question: Question, picture: Image.Image, name: str) -> FlowSample:
    """Inputs, groups and answer of a question about a picture."""
    text = prompt(question.text)
    inputs = dict(processor(images=[picture], text=[text], return_tensors="pt"))
    spans: dict[str, Any] = {"question": question.text}
    if question.options:
        spans |= dict(zip(("true_option", "false_option"), question.options, strict=True))
    boxes = [(thing.column * CELL, thing.row * CELL, CELL, CELL) for thing in question.things]
    groups = find_token_groups(processor, inputs, image=picture, spans=spans, boxes=boxes)
    answer = processor.tokenizer.convert_tokens_to_ids(question.answer)
    return FlowSample(inputs, groups, [[answer]], [name], {"task": question.task})


def samples(
    processor: Any, count: int, seed: int, tasks: Sequence[str] = TASKS
) -> list[tuple[FlowSample, Question, Image.Image]]:
    """`count` questions of each task, each about a scene of its own."""
    generator = random.Random(seed)
    made = []
    for task in tasks:
        for number in range(count):
            scene = draw_scene(generator)
            while not can_ask(scene, (task,)):
                scene = draw_scene(generator)
            question = ask(scene, generator, (task,))
            picture = Image.fromarray(render(scene, generator))
            made.append((sample(processor, question, picture, f"{task} {number}"), question, picture))
    return made


def flow_table(records: Sequence[dict[str, Any]], tasks: Sequence[str] = TASKS) -> str:
    """For each task and pair the deepest mean change over the layers."""
    lines = ["mean change of the answer's probability in %, at the layer where it is largest", ""]
    lines.append(f"{'':28}" + "".join(f"{task:>16}" for task in tasks))
    for pair in dict.fromkeys(record["pair"] for record in records):
        cells = []
        for task in tasks:
            mean = changes(records, pair, task)
            layer = min(mean, key=lambda at: mean[at])
            cells.append(f"{mean[layer]:8.1f} (L{layer})")
        lines.append(f"{pair.replace(':', ' → '):28}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def changes(records: Sequence[dict[str, Any]], pair: str, task: str | None = None) -> dict[int, float]:
    """Mean change by layer."""
    own: dict[int, list[float]] = {}
    for record in records:
        if record["pair"] == pair and task in (None, record["task"]):
            own.setdefault(record["layer"], []).append(record["change_percent"])
    return {layer: sum(values) / len(values) for layer, values in own.items()}


def readouts(model: Any, processor: Any, drawn: Sequence[Any], window: int) -> tuple[list[Any], list[Any]]:
    """Answers by layer and Jaccard similarities."""
    answers, similarities = [], []
    for own, question, _ in tqdm(drawn, desc="readouts"):
        others = {"false option": question.options[1].capitalize()} if question.options else {}
        words = answer_tokens(processor.tokenizer, question.answer, **others)
        answers += answer_probability_by_layer(model, own.inputs, words, names=own.names)
        similarities += topk_jaccard(model, own.inputs, own.groups["question"], window=window, names=own.names)
    return answers, similarities


def views(model: Any, processor: Any, drawn: Sequence[Any], count: int, window: int) -> list[Any]:
    """What the page shows of the first questions of each task."""
    shown: dict[str, list[Any]] = {}
    for own, question, picture in tqdm(drawn, desc="views"):
        if len(shown.setdefault(question.task, [])) == count:
            continue
        view = sample_view(
            model,
            processor,
            own,
            picture,
            question.text,
            targets=("question", "last"),
            window=window,
            self_check=len(shown) == 1,
        )
        shown[question.task].append(view)
    return [view for own_views in shown.values() for view in own_views]
