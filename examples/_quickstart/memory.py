"""The peak memory of training steps, beyond the base weights."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function


os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports each start and stop otherwise
MARK = "peft_ext_quickstart_steps"


def peak_bytes(build: Callable[[], Callable[[], None]], steps: int = 2, device: str = "cpu") -> int:
    """
    Peak of the bytes that torch holds during training steps, counted from the moment before `build` is called.

    Args:
        build (`Callable[[], Callable[[], None]]`):
            Adapts an existing model and returns a function that does one training step.
        steps (`int`, *optional*, defaults to 2):
            Steps to watch. The optimiser allocates its state at the end of the first, so the peak of the second is
            what a long run needs.
        device (`str`, *optional*, defaults to `"cpu"`): Where the model lives.

    What is counted: adapter parameters and their index tables, activations kept for backward, gradients, optimiser
    state, and every temporary that is alive at the worst moment of a step. What is not: the weights and the batch that
    exist before `build` (equal for all methods), and what `build` has freed again when the first step begins. On CPU
    the number comes from the allocator's own events in torch's profiler, so scratch memory inside operators counts;
    memory of libraries that bypass torch's allocator does not.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        step = build()
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(steps):
            step()
        return torch.cuda.max_memory_allocated(device) - before

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = build()
        with record_function(MARK):
            for _ in range(steps):
                step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return _peak(events)


def _peak(events: list[dict[str, Any]]) -> int:
    """Highest running sum of the allocator events since the marked range began."""
    begin = next(event["ts"] for event in events if event.get("name") == MARK and "dur" in event)
    changes = sorted(
        (event["ts"], event["args"]["Ev Idx"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]"
    )
    live = peak = 0
    for when, _, change in changes:
        live += change
        # what stood at the beginning of the range counts, what came and went before it does not
        peak = max(peak, live) if when >= begin else live
    return peak
