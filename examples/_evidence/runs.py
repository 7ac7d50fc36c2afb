"""One training, what determines it, and the file that finished ones are kept in."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from . import methods, problems
from .problems import Part, Problem
from .training import EVALUATION_BATCH, Recipe, evaluate, inputs_of, train


SEARCH_SEED = 1000  # of the search of learning rates; none of the seeds that are reported


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        model, data, image_size, pooling, dtype: see `problems.load`.
        method: see `methods`.
        size: training samples.
        steps, batch_size: of training.
        learning_rate, seed: the seed decides the head, the order of the samples and random entries.
        validation, test: samples to evaluate on: validation under `SEARCH_SEED`, test under any other seed.
    """

    model: str
    data: str
    method: str
    size: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    validation: int
    test: int
    image_size: int | None = None
    pooling: str | None = None
    dtype: str = "float32"

    @property
    def problem(self) -> Problem:
        return problems.load(self.model, self.data, self.image_size, self.pooling, self.dtype)


class Probe(nn.Module):
    """A head alone, on features as inputs."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.head(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return problems.SequenceClassifierOutput(loss=loss, logits=logits)


@lru_cache(maxsize=32)
def frozen_features(model: str, source: str, part: str, count: int, *how: Any) -> Part:
    """Features of the first samples of a part by the pretrained encoder, which a probe leaves as it is."""
    problem = problems.load(model, source, *how)
    samples: Part = getattr(problem, part).first(count)
    order = samples.by_length()
    features = torch.empty(len(samples), problem.width)
    with torch.no_grad():
        for start in range(0, len(order), EVALUATION_BATCH):
            rows = order[start : start + EVALUATION_BATCH]
            features[torch.tensor(rows)] = (
                problem.base.features(**inputs_of(problem.base, samples, rows)).float().cpu()
            )
    return Part(features, samples.labels, samples.lengths)


def evaluated_part(seed: int) -> str:
    """The search looks at validation samples alone, and every other run at test samples alone."""
    return "validation" if seed == SEARCH_SEED else "test"


def execute(run: Run) -> dict[str, Any]:
    """Train and evaluate; the run's settings and what came out."""
    begin = time.process_time()
    method = methods.Method.parse(run.method)
    problem = run.problem
    model = methods.adapt(problem.base, method, problem.train.first(run.size), run.seed)
    adapter, head = methods.trained_parameters(model, method)
    part = evaluated_part(run.seed)
    counts = {"train": run.size, part: getattr(run, part)}
    parts = {name: getattr(problem, name).first(count) for name, count in counts.items()}
    if method.kind == "probe":
        how = (run.image_size, run.pooling, run.dtype)
        parts = {name: frozen_features(run.model, run.data, name, count, *how) for name, count in counts.items()}
        model = Probe(model.head)  # type: ignore[arg-type]
    recipe = Recipe(run.steps, run.batch_size)
    return {
        **asdict(run),
        "adapter_parameters": adapter,
        "head_parameters": head,
        **train(model, parts["train"], recipe, run.learning_rate, run.seed),
        f"{part}_result": evaluate(model, parts[part]),
        "cpu_seconds": round(time.process_time() - begin, 2),
    }
