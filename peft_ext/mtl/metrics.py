"""Relative task drop: how much worse several tasks do together than each on its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


REDUCTIONS = ("metrics", "tasks")
Metrics = Mapping[str, Mapping[str, float]]


def relative_task_drop(
    metrics: Metrics,
    baseline: Metrics,
    higher_is_better: Mapping[str, Any],
    reduction: str = "metrics",
) -> float:
    """
    Relative task drop Δm in percent. Lower is better; a negative value is better than the baseline.

    Paper: Maninis et al., [Attentive Single-Tasking of Multiple Tasks](https://arxiv.org/abs/1904.08918).

    Every metric contributes `(-1)^δ (M_b − M_s) / M_s`, with δ = 1 where higher is better. Papers average in two ways,
    which differ by several points on the nine metrics of NYUv2. Tables usually hold the mean over all metrics. Printed
    formulas take the mean over tasks of the mean over the metrics of each task.

    Args:
        metrics (`dict[str, dict[str, float]]`):
            Per task, the value of each metric.
        baseline (`dict[str, dict[str, float]]`):
            The same for single-task learning.
        higher_is_better (`dict`):
            `True` or `False` per metric name. Or one such dict per task, if a name means something else in each.
        reduction (`str`, *optional*, defaults to `"metrics"`):
            `"metrics"`: the mean over all metrics, as in tables. `"tasks"`: the mean over tasks of the mean over their
            metrics, as in the printed formula.

    Returns:
        Percent.

    Raises:
        `ValueError`: If a metric is missing or not finite, a baseline is not above zero, or the reduction is not
            known.

    Example:

        ```py
        >>> from peft_ext.mtl import relative_task_drop

        >>> relative_task_drop({"seg": {"miou": 0.40}}, {"seg": {"miou": 0.50}}, {"miou": True})
        19.999999999999996
        ```
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not known; choose one of {', '.join(REDUCTIONS)}.")
    if set(metrics) != set(baseline) or not metrics:
        raise ValueError(f"metrics have the tasks {sorted(metrics)} and the baseline {sorted(baseline)}.")
    drops: dict[str, list[float]] = {}
    for task, values in metrics.items():
        if set(values) != set(baseline[task]) or not values:
            raise ValueError(
                f"Task {task!r} has the metrics {sorted(values)}, and {sorted(baseline[task])} in the baseline."
            )
        for name, value in values.items():
            signs = higher_is_better.get(task) if isinstance(higher_is_better.get(task), Mapping) else higher_is_better
            if not isinstance(signs, Mapping) or name not in signs:
                raise ValueError(f"higher_is_better does not say whether higher is better for {task!r}'s {name!r}.")
            reference = baseline[task][name]
            if not reference > 0 or not np.isfinite([reference, value]).all():
                raise ValueError(
                    f"{name!r} of {task!r} is {value!r}, and {reference!r} in the baseline; for a relative drop both "
                    "must be finite and the baseline above 0."
                )
            drop = (value - reference) / reference
            drops.setdefault(task, []).append(-drop if signs[name] else drop)
    if reduction == "tasks":
        return 100.0 * float(np.mean([np.mean(values) for values in drops.values()]))
    return 100.0 * float(np.mean([drop for values in drops.values() for drop in values]))
