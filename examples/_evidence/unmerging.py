"""Merge and unmerge an adapter again and again in bfloat16: how far do the weights and the outputs drift?"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import methods, problems
from .methods import Method
from .problems import Classifier, Part
from .training import Recipe, inputs_of, train


@dataclass(frozen=True)
class UnmergeRun:
    """
    Attributes:
        model, data, method, size, batch_size, learning_rate, seed: see `runs.Run`.
        cycles: steps after each of which drift is measured; the largest is the number of steps.
        test: samples for the outputs.
    """

    model: str
    data: str
    method: str
    size: int
    batch_size: int
    learning_rate: float
    seed: int
    cycles: tuple[int, ...]
    test: int


def execute(run: UnmergeRun) -> dict[str, Any]:
    """
    Train an adapter in float32 on a base in bfloat16; after every step merge it, as for sampling, and unmerge it.

    Returns:
        `dict`: the settings and, after each number of cycles, `weights`: mean |change| of the adapted weights over
        their mean magnitude, `changed`: share of their entries that changed, and `features`: largest change of a
        feature of the base model, over their standard deviation.
    """
    begin = time.process_time()
    problem = problems.load(run.model, run.data)
    base = copy.deepcopy(problem.base).to(torch.bfloat16)
    method = Method.parse(run.method)
    model: Any = methods.adapt(base, method, problem.train.first(run.size), run.seed)
    names = methods.linears(base)
    inner = model.get_base_model()
    test = problem.test.first(run.test)

    def weights() -> list[Tensor]:
        return [inner.get_submodule(name).get_base_layer().weight.detach() for name in names]

    def outputs() -> Tensor:
        with model.disable_adapter():
            return model_features(inner, test)

    first_weights, first_outputs = copy.deepcopy(weights()), outputs()
    magnitude = torch.stack([weight.float().abs().mean() for weight in first_weights]).mean()
    drift: list[dict[str, float]] = []

    def cycle(step: int) -> None:
        model.merge_adapter()
        model.unmerge_adapter()
        if step not in run.cycles:
            return
        changes = [(now.float() - first.float()).abs() for now, first in zip(weights(), first_weights, strict=True)]
        entries = sum(change.numel() for change in changes)
        difference = (outputs() - first_outputs).abs().max() / first_outputs.std()
        drift.append(
            {
                "cycles": step,
                "weights": float(torch.stack([change.mean() for change in changes]).mean() / magnitude),
                "changed": sum(int((change > 0).sum()) for change in changes) / entries,
                "features": float(difference),
            }
        )

    recipe = Recipe(max(run.cycles), run.batch_size)
    train(model, problem.train.first(run.size), recipe, run.learning_rate, run.seed, after_step=cycle)
    result = {**asdict(run), "cycles": list(run.cycles), "drift": drift}
    return {**result, "cpu_seconds": round(time.process_time() - begin, 2)}


@torch.no_grad()
def model_features(model: Classifier, part: Part) -> Tensor:
    """Pooled features of the samples, `[samples, width]`: the head would add its own training to them."""
    return model.features(**inputs_of(model, part, range(len(part)))).float()
