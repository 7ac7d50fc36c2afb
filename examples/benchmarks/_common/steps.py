"""One training step, and the interleaved timing of many methods' steps."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm


Result = TypeVar("Result")


class Stepper:
    """
    zero_grad, forward, backward, AdamW step.

    AdamW is fused, as in `transformers.Trainer`: a loop over tensors would charge methods for having many tensors.
    No weight decay: with it, the masked method would move entries outside of its mask.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        self.model = model
        self.batch = batch
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0, fused=True) if trainable else None

    def __call__(self) -> None:
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        self.model(**self.batch).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()

    def optimizer_bytes(self) -> int:
        """Bytes of the optimiser's state; 0 before the first step."""
        if self.optimizer is None:
            return 0
        entries = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(value.nbytes for value in entries if isinstance(value, Tensor))


def seconds(stepper: Stepper, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of one step by `clock`; on CUDA between two events on the stream, nothing else in flight."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(device)  # not that of the current device, which may be another
        torch.cuda.synchronize(device)
        start.record(stream)
        stepper()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1000
    begin = clock()
    stepper()
    return clock() - begin


def synchronise(device: torch.device) -> None:
    """Wait for what runs on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What some work returns, and its seconds on the wall."""
    synchronise(device)
    begin = time.perf_counter()
    result = work()
    synchronise(device)
    return result, time.perf_counter() - begin


def interleave(
    steppers: Mapping[str, Stepper],
    rounds: int,
    warmup: int,
    device: torch.device,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """
    Times of every method's steps, one of each per round, so that a slow spell of the machine hits all of them.

    The order is drawn anew in each round: a rotation would keep every method behind the same predecessor and its
    cache contents. Nothing is garbage-collected meanwhile: that would fall on some method's step.
    """
    order, times = list(steppers), {name: list[float]() for name in steppers}
    shuffle = random.Random(seed).shuffle
    gc.collect()
    gc.disable()
    try:
        for turn in tqdm(range(warmup + rounds), desc="timing", unit="round"):
            shuffle(order)
            for name in order:
                elapsed = seconds(steppers[name], device, clock)
                if turn >= warmup:
                    times[name].append(elapsed)
    finally:
        gc.enable()
    return times


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, sample: list[float]) -> Spread:
        lower, median, upper = torch.tensor(sample, dtype=torch.float64).quantile(
            torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        )
        return cls(median.item(), lower.item(), upper.item())


def pair_ratio(times: list[float], reference: list[float]) -> Spread:
    """Spread of the ratios within rounds: what two methods did at the same time on the same machine."""
    return Spread.of([mine / other for mine, other in zip(times, reference, strict=True)])


def print_profile(name: str, stepper: Callable[[], None], device: torch.device) -> None:
    """The operators that a step's time goes to."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            stepper()
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    operators = profiler.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60)
    print(f"\n{name}, three steps\n{operators}")


def fits(stepper: Stepper) -> bool:
    """Whether the device has the memory for a step."""
    try:
        stepper()
    except torch.OutOfMemoryError:
        return False
    return True
