"""Training of one run, and which samples the trained model gets right."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from .problems import Part


WARMUP_SHARE = 0.1
MAX_GRADIENT_NORM = 1.0
HEAD_RATE = 2e-3  # of the new head under every method, so that the search is about the method; a probe has its own
EVALUATION_BATCH = 100


@dataclass(frozen=True)
class Recipe:
    """What all methods share; the learning rate alone is searched for each."""

    steps: int
    batch_size: int


def batches(part: Part, recipe: Recipe, seed: int) -> Iterator[list[int]]:
    """As many batches as there are steps, epoch after epoch, in the order of the seed."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[list[int]] = []
    for _ in range(recipe.steps):
        if not queue:
            queue = part.epoch(recipe.batch_size, generator)
        yield queue.pop()


def train(
    model: nn.Module,
    part: Part,
    recipe: Recipe,
    learning_rate: float,
    seed: int,
    after_step: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """
    Train what requires gradients: AdamW without decay, cosine schedule with warm-up, norms clipped, no dropout.
    `after_step` is called with the number of each step, from 1.

    Returns:
        `dict`: mean loss of the last tenth of the steps, and median seconds of a step.
    """
    model.eval()  # batch norms keep their statistics
    optimizer = torch.optim.AdamW(groups(model, learning_rate), weight_decay=0.0, fused=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP_SHARE * recipe.steps), recipe.steps)
    losses, seconds = [], []
    for step, indices in enumerate(batches(part, recipe, seed), start=1):
        begin = time.perf_counter()
        loss = model(**inputs_of(model, part, indices, with_labels=True)).loss
        if not math.isfinite(loss.item()):
            losses.append(math.inf)
            break
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
        after_step(step)
    last = losses[-max(1, recipe.steps // 10) :]
    return {"train_loss": finite(sum(last) / len(last)), "step_seconds": float(torch.tensor(seconds).median())}


def groups(model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
    """What the method trains, at `learning_rate`, and the head, at `HEAD_RATE`; at `learning_rate` if it is alone."""
    head, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head if "head" in name.split(".") else others).append(parameter)
    rest = [{"params": others, "lr": learning_rate}] if others else []
    return [*rest, {"params": head, "lr": HEAD_RATE if others else learning_rate}]


def inputs_of(model: nn.Module, part: Part, indices: Sequence[int], with_labels: bool = False) -> dict[str, Tensor]:
    """A batch on the model's device."""
    device = next(model.parameters()).device
    batch = part.batch(indices)
    return {name: value.to(device) for name, value in batch.items() if with_labels or name != "labels"}


def finite(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None


@torch.no_grad()
def logits_of(model: nn.Module, part: Part) -> Tensor:
    """`[samples, classes]`, in evaluation mode."""
    model.eval()
    order = part.by_length()
    result: Tensor | None = None
    for start in range(0, len(order), EVALUATION_BATCH):
        chosen = order[start : start + EVALUATION_BATCH]
        logits = model(**inputs_of(model, part, chosen)).logits.float().cpu()
        result = logits.new_empty(len(part), logits.shape[1]) if result is None else result
        result[torch.tensor(chosen)] = logits
    assert result is not None
    return result


def evaluate(model: nn.Module, part: Part) -> dict[str, Any]:
    """Accuracy, mean loss, and the correct samples as bits of a hexadecimal number, for paired comparisons."""
    logits = logits_of(model, part)
    correct = (logits.argmax(1) == part.labels).tolist()
    loss = nn.functional.cross_entropy(logits, part.labels).item()
    return {"accuracy": sum(correct) / len(correct), "loss": finite(loss), "correct": packed(correct)}


def packed(bits: list[bool]) -> str:
    """The first bit is the highest; a leading one keeps zeros."""
    return f"{int('1' + ''.join(str(int(bit)) for bit in bits), 2):x}"


def unpacked(text: str) -> list[bool]:
    """Inverse of [`packed`]."""
    return [bit == "1" for bit in f"{int(text, 16):b}"[1:]]
