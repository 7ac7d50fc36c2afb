"""Step times, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn


def training_step(
    model: nn.Module, batch: dict[str, torch.Tensor], learning_rate: float, autocast: torch.dtype | None = None
) -> Callable[[], None]:
    """One optimiser step on `batch` as Trainer does it: forward (in `autocast` if given), backward, fused AdamW."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)

    def step() -> None:
        with torch.autocast(batch["labels"].device.type, dtype=autocast, enabled=autocast is not None):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def interleaved(steps: Mapping[str, Callable[[], None]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """
    Seconds of `rounds` calls of each step.

    Every round calls each step once, starting with another one each time, so that whatever else the machine does in
    the meantime meets all of them alike.
    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            begin = time.perf_counter()
            steps[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def seconds_per_step(step: Callable[[], None], count: int, device: str, warmup: int = 2) -> list[float]:
    """Seconds of `count` calls after `warmup` others."""
    seconds = []
    for turn in range(-warmup, count):
        begin = time.perf_counter()
        step()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        if turn >= 0:
            seconds.append(time.perf_counter() - begin)
    return seconds


def relative(seconds: Mapping[str, list[float]], reference: str) -> dict[str, float]:
    """Median over the rounds of each step's time divided by the reference's time in the same round."""
    return {
        name: statistics.median(own / other for own, other in zip(times, seconds[reference], strict=True))
        for name, times in seconds.items()
    }
