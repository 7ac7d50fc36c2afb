"""One training on the shifted task, and what it is worth."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, get_cosine_schedule_with_warmup

from peft_ext.factory import Method
from peft_ext.factory.parts import adapt
from peft_ext.knockout.read.modality import ModalityAttention, lmar

from .batches import Batches, accuracy
from .rates import LEARNING_RATES
from .world import PALETTE


RANKS, PERCENTS = (1, 2, 4, 8), (1, 25, 50, 100)
METHODS = (
    "none",
    "full",
    "lora-8",
    "ia3",
    *(f"mores-{rank}@{percent}" for rank in RANKS for percent in PERCENTS),
    "connector-1",
    "connector-4",
    "projector",
    "mores-1@1+",
)
# The picture's colours move by one: what looks green is called red now.
SHIFTED = dict(zip(PALETTE, [*list(PALETTE.values())[1:], next(iter(PALETTE.values()))], strict=True))
COLOR_TASKS = ("QueryColor", "QueryShape", "ChooseAttr", "ChooseCat", "LogicalObj")
OTHER_TASKS = ("QueryAttr", "ChooseRel")


def train(model: Any, batches: Batches, steps: int, learning_rate: float, images: int, turns: int) -> None:
    """AdamW with a cosine schedule on conversations of the shifted world, all tasks."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimiser, steps // 20, steps)
    model.train()
    for _ in range(steps):
        loss = model(**batches.conversations(images, turns)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    model.eval()


def run(name: str, seed: int, options: argparse.Namespace, learning_rate: float | None = None) -> dict[str, Any]:
    """One method, one seed."""
    processor = AutoProcessor.from_pretrained(options.model)
    model = LlavaForConditionalGeneration.from_pretrained(options.model).eval()
    torch.manual_seed(seed)
    trained = 0
    if name != "none":
        method = Method.parse(name)
        model = adapt(model, method)
        trained = model.num_parameters(only_trainable=True)
        rate = LEARNING_RATES[method.kind] if learning_rate is None else learning_rate
        train(model, Batches(processor, seed, SHIFTED), options.steps, rate, options.images, options.turns)
    held_out = Batches(processor, 10_000 + seed, SHIFTED)
    number = options.questions
    scores = {
        "color": accuracy(model, held_out, number, COLOR_TASKS),
        "other": accuracy(model, held_out, number, OTHER_TASKS),
    }
    batch, _ = Batches(processor, 20_000 + seed, SHIFTED).questions(options.lmar_samples)
    attention = lmar(model, [batch], system=options.system)
    return {
        "method": name,
        "seed": seed,
        "trained_parameters": trained,
        "accuracy": scores,
        "lmar": attention.ratio.tolist(),
        "image_share": attention.image_share.mean(dim=0).tolist(),
    }


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per method: mean and standard deviation over seeds."""
    rows = []
    known = {result["method"] for result in results}
    for name in [*(name for name in METHODS if name in known), *sorted(known - set(METHODS))]:
        mine = [result for result in results if result["method"] == name]
        row: dict[str, Any] = {"method": name, "trained_parameters": mine[0]["trained_parameters"]}
        row["seeds"] = len(mine)
        series = {
            "color": [result["accuracy"]["color"] for result in mine],
            "other": [result["accuracy"]["other"] for result in mine],
            "lmar": [statistics.mean(result["lmar"]) for result in mine],
            "image_share": [statistics.mean(result["image_share"]) for result in mine],
        }
        for key, values in series.items():
            row[key] = statistics.mean(values)
            row[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | trained | seeds | accuracy, colours | accuracy, places | LMAR | attention on the image |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [f"{row[key]:.3f} ± {row[f'{key}_sd']:.3f}" for key in ("color", "other", "lmar", "image_share")]
        lines.append(f"| {row['method']} | {row['trained_parameters']:,} | {row['seeds']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pool(results: list[dict[str, Any]]) -> ModalityAttention:
    """The seeds' LMAR and shares, one sample each."""
    ratio = torch.tensor([result["lmar"] for result in results], dtype=torch.float64).unsqueeze(2)
    share = torch.tensor([result["image_share"] for result in results], dtype=torch.float64)
    return ModalityAttention(ratio, torch.ones_like(ratio), share)
