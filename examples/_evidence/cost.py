"""Time and memory of a training step of each method, side by side on one batch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from _quickstart.memory import peak_bytes
from _quickstart.timing import interleaved, relative, training_step

from . import methods
from .methods import Method
from .protocol import Comparison
from .training import inputs_of


def measure(comparison: Comparison, names: Sequence[str], reference: str, rounds: int) -> dict[str, Any]:
    """
    Returns:
        `dict`: per method median seconds, the median of its ratios to `reference` within a round, and the peak of the
        bytes that a step needs beyond the weights. A probe's features are not cached here.
    """
    problem = comparison.run(comparison.cells[0], comparison.data[0], 0.0, 0).problem
    part = problem.train.first(max(comparison.steps))
    batch = inputs_of(problem.base, part, range(comparison.batch_size), with_labels=True)
    device = str(next(problem.base.parameters()).device)

    def step(name: str) -> Any:
        method = Method.parse(name)
        return training_step(methods.adapt(problem.base, method, part, 0), batch, method.centre)

    seconds = interleaved({name: step(name) for name in names}, rounds, 2)
    ratios = relative(seconds, reference)
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "ratio": ratios[name],
            "peak_bytes": peak_bytes(lambda name=name: step(name), device=device),  # type: ignore[misc]
        }
        for name in names
    }
