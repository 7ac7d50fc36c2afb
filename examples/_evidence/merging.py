"""Adapters of four domains: what each does to the other domains, and what is left when they are merged into one."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from peft import get_peft_model
from torch import nn

from . import methods, problems
from .methods import Method
from .problems import Problem
from .runs import Probe, frozen_features
from .training import Recipe, evaluate, train


FORMS = ("linear", "ties", "dare_linear")
# PEFT's TIES and DARE prune LoRA's factors, each by itself; these prune the update, and factor what is left again.
FORMS_ON_THE_UPDATE = ("ties_svd", "dare_linear_svd")
WEIGHTS = (0.3, 0.6, 1.0)  # of each adapter; the best on validation, for every form and method
DENSITY = 0.5  # entries that TIES and DARE keep


@dataclass(frozen=True)
class MergeRun:
    """
    Attributes:
        model: see `pretrained.encoders.load`.
        data: domains, an adapter and a head for each.
        method: of the adapters; one that PEFT has several of on a model.
        size, steps, batch_size, learning_rate, seed: of their training.
        validation, test: samples of a domain to evaluate on.
    """

    model: str
    data: tuple[str, ...]
    method: str
    size: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    validation: int
    test: int


class Domains:
    """
    The adapters of a [`MergeRun`] on one model, trained one after the other.

    Attributes:
        model: with an adapter per domain.
        heads: trained with each domain's adapter.
        probes: heads that were trained on the pretrained encoder.
    """

    def __init__(self, run: MergeRun) -> None:
        self.run = run
        self.method = Method.parse(run.method)
        self.problems = {name: problems.load(run.model, name) for name in run.data}
        base = copy.deepcopy(self._first.base).requires_grad_(False)
        self.model: Any = None
        for number, (name, problem) in enumerate(self.problems.items()):
            config = methods.configuration(problem.base, self.method, problem.train, run.seed)
            with methods.seeded(len(run.data) * run.seed + number):
                if self.model is None:
                    self.model = get_peft_model(base, config, adapter_name=name)
                else:
                    self.model.add_adapter(name, config)
        self.probes = {name: self._probe(name) for name in run.data}
        self.heads = {name: self._train(name) for name in run.data}

    @property
    def _first(self) -> Problem:
        return next(iter(self.problems.values()))

    def _train(self, name: str) -> nn.Module:
        self.model.set_adapter(name)
        problem, run = self.problems[name], self.run
        inner = self.model.get_base_model()
        inner.head = copy.deepcopy(problem.base.head)
        inner.scale.copy_(problem.base.scale)
        inner.reset_head(run.seed)
        inner.head.requires_grad_(True)
        recipe = Recipe(run.steps, run.batch_size)
        train(self.model, problem.train.first(run.size), recipe, run.learning_rate, run.seed)
        return inner.head.requires_grad_(False)

    def _probe(self, name: str) -> nn.Module:
        run, base = self.run, copy.deepcopy(self.problems[name].base)
        base.reset_head(run.seed)
        probe = Probe(base.head)
        features = frozen_features(run.model, name, "train", run.size)
        train(probe, features, Recipe(run.steps, run.batch_size), Method.parse("probe").centre, run.seed)
        return probe.head

    def accuracy(self, name: str, heads: dict[str, nn.Module], part: str) -> float:
        """Of the active adapter on a domain, with that domain's head."""
        problem, inner = self.problems[name], self.model.get_base_model()
        inner.head = heads[name]
        inner.scale.copy_(problem.base.scale)
        count = self.run.test if part == "test" else self.run.validation
        return float(evaluate(self.model, getattr(problem, part).first(count))["accuracy"])

    @property
    def forms(self) -> tuple[str, ...]:
        """Ways to combine the adapters. Of ours, whatever is pruned is the update."""
        return FORMS if self.method.kind in methods.OURS else FORMS + FORMS_ON_THE_UPDATE

    def combine(self, form: str, weight: float) -> None:
        """Add and activate the adapter `merged`. What is linear is exact for LoRA too: there it is called `cat`."""
        names = list(self.run.data)
        kind = "cat" if form == "linear" and self.method.kind not in methods.OURS else form
        options: dict[str, Any] = {} if form == "linear" else {"density": DENSITY}
        if form in FORMS_ON_THE_UPDATE:
            options["svd_rank"] = len(names) * self.method.size  # that of the sum
        with methods.seeded(self.run.seed):  # DARE drops at random
            self.model.add_weighted_adapter(names, [weight] * len(names), "merged", combination_type=kind, **options)
        self.model.set_adapter("merged")

    def drop(self) -> None:
        """Delete the adapter `merged`."""
        self.model.set_adapter(self.run.data[0])
        self.model.delete_adapter("merged")


def execute(run: MergeRun) -> dict[str, Any]:
    """
    Train, evaluate and merge.

    Returns:
        `dict`: the settings; per domain `pretrained` (a probe), `alone` (its own adapter and head), `others` (the
        probe's accuracy while each other domain's adapter is active: what is forgotten) and, per form, `merged` with
        the weight chosen.
    """
    begin = time.process_time()
    domains = Domains(run)
    names = list(run.data)
    result: dict[str, Any] = {**asdict(run), "data": names, "alone": {}, "others": {}, "merged": {}, "weights": {}}
    with domains.model.disable_adapter():
        result["pretrained"] = {name: domains.accuracy(name, domains.probes, "test") for name in names}
    for name in names:
        domains.model.set_adapter(name)
        result["alone"][name] = domains.accuracy(name, domains.heads, "test")
        others = [other for other in names if other != name]
        result["others"][name] = {other: domains.accuracy(other, domains.probes, "test") for other in others}
    for form in domains.forms:
        scores = {}
        for weight in WEIGHTS:
            domains.combine(form, weight)
            scores[weight] = fmean(domains.accuracy(name, domains.heads, "validation") for name in names)
            domains.drop()
        best = max(scores, key=lambda weight: scores[weight])
        domains.combine(form, best)
        result["weights"][form] = best
        result["merged"][form] = {name: domains.accuracy(name, domains.heads, "test") for name in names}
        domains.drop()
    return {**result, "cpu_seconds": round(time.process_time() - begin, 2)}
