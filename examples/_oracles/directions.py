"""Directions of the methods that combine the gradients of several tasks."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peft_ext.mtl import aggregate, make_aggregator
from peft_ext.mtl.aggregators import Step

from .loading import Missing, Row, Stub, published, relative


TASKS, PARAMETERS, PROBLEMS = 3, 40, 20
REPOSITORY, FILE = "FAMO", "methods/weight_methods.py"


def jacobian(seed: int, tasks: int = TASKS) -> Tensor:
    """Gradients `[tasks, parameters]`: some agree, some conflict, and their norms differ by an order of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    common, own = torch.randn(PARAMETERS, generator=generator), torch.randn(tasks, PARAMETERS, generator=generator)
    return torch.logspace(-0.5, 0.5, tasks)[:, None] * (0.3 * common + own)


def direction(method: Any, rows: Tensor) -> Tensor:
    """What published code would subtract: the gradient it leaves on parameters whose tasks have these gradients."""
    parameters = torch.zeros(rows.shape[1], requires_grad=True)
    losses = rows @ parameters + 1.0
    if hasattr(method, "overwrite_grad"):  # CAGrad and GradDrop set the gradient themselves
        method.get_weighted_loss(losses, [parameters])
    elif hasattr(method, "_set_pc_grads"):
        method._set_pc_grads(losses, [parameters])
    else:
        method.get_weighted_loss(losses=losses, shared_parameters=[parameters])[0].backward()
    assert parameters.grad is not None
    return parameters.grad


def _nearness(pairs: list[tuple[Tensor, Tensor]]) -> str:
    """Of our directions to the published ones: the angle between them and the ratio of their lengths."""
    ratios = [float(a.norm() / b.norm()) for a, b in pairs]
    return f"{_angle(pairs)}, length {min(ratios):.4f} to {max(ratios):.4f} of theirs"


def _angle(pairs: list[tuple[Tensor, Tensor]]) -> str:
    cosines = [torch.cosine_similarity(a.double(), b.double(), dim=0).clamp(max=1.0) for a, b in pairs]
    return f"angle ≤ {max(float(torch.rad2deg(torch.arccos(cosine))) for cosine in cosines):.0e}°"


def same_directions(code: Path) -> Iterator[Row]:
    module = published(code, REPOSITORY, FILE, cvxpy=Stub("cvxpy"))
    device = torch.device("cpu")
    problem = f"directions, {PROBLEMS} problems of {TASKS} tasks"
    for name, make, options in (
        ("cagrad", lambda: module.CAGrad(TASKS, device, c=0.4), {"c": 0.4, "reduction": "reference"}),
        ("mgda", lambda: module.MGDA(TASKS, device), {}),
        ("imtl_g", lambda: module.IMTLG(TASKS, device), {}),
    ):
        pairs = []
        for seed in range(PROBLEMS):
            rows = jacobian(seed)
            pairs.append((aggregate(rows, method=name, **options), direction(make(), rows)))
        yield Row(f"`{name}`", f"FAMO `{type(make()).__name__}`", problem, _nearness(pairs))


def random_directions(code: Path) -> Iterator[Row]:
    """PCGrad and GradDrop draw at random: each published outcome must be one of ours."""
    module = published(code, REPOSITORY, FILE, cvxpy=Stub("cvxpy"))
    device = torch.device("cpu")
    rows = jacobian(0)
    random.seed(0)
    torch.manual_seed(0)
    options = {"reduction": "reference"}
    ours = [aggregate(rows, method="pcgrad", seed=seed, **options) for seed in range(200)]
    theirs = [direction(module.PCGrad(TASKS, device), rows) for _ in range(50)]
    worst = max(min(relative(a, b) for a in ours) for b in theirs)
    yield Row(
        "`pcgrad`", "FAMO `PCGrad`", "each of 50 random outcomes is one of ours", f"relative difference ≤ {worst:.0e}"
    )
    ours = [aggregate(rows, method="graddrop", seed=seed, **options) for seed in range(200)]
    theirs = [direction(module.GradDrop(TASKS, device), rows) for _ in range(50)]
    possible = torch.stack(ours)
    scale = possible.abs().max()
    worst = max(float(((possible - b).abs().min(dim=0).values / scale).max()) for b in theirs)
    yield Row(
        "`graddrop`", "FAMO `GradDrop`", "each coordinate of 50 random outcomes is one of ours",
        f"relative difference ≤ {worst:.0e}",
    )  # fmt: skip


def nash(code: Path) -> Iterator[Row]:
    for package in ("cvxpy", "ecos"):
        if importlib.util.find_spec(package) is None:
            raise Missing(f"the published Nash-MTL needs {package}: pip install cvxpy ecos")
    module = published(code, "nash-mtl", FILE)
    solved, pairs, worst = [], [], 0.0
    for seed in range(PROBLEMS):
        rows = jacobian(seed)
        method = module.NashMTL(TASKS, torch.device("cpu"), max_norm=0.0, optim_niter=100)
        ours, theirs = aggregate(rows, method="nash_mtl", max_norm=0), direction(method, rows)
        worst = max(worst, _unfairness(rows, ours))
        solved.append(_unfairness(rows, theirs) < 1e-2)
        if solved[-1]:
            pairs.append((ours, theirs))
    yield Row(
        "`nash_mtl`", "nash-mtl `NashMTL`",
        f"directions, the {sum(solved)} of {PROBLEMS} problems that the published solver solves to 1 %",
        f"{_angle(pairs)}; ours solves all {PROBLEMS}, to {worst:.0e}",
    )  # fmt: skip


def _unfairness(rows: Tensor, direction: Tensor) -> float:
    """How far a direction is from Nash-MTL's condition: each task's weight times its projection is the same."""
    weights = torch.linalg.lstsq(rows.double().T, direction.double()[:, None]).solution[:, 0]
    gains = weights * (rows.double() @ direction.double())
    return float((gains / gains.mean() - 1).abs().max())


def famo(code: Path) -> Iterator[Row]:
    module = published(code, REPOSITORY, FILE, cvxpy=Stub("cvxpy"))
    theirs = module.FAMO(TASKS, torch.device("cpu"), gamma=1e-3, w_lr=0.025)
    ours = make_aggregator("famo", TASKS, gamma=1e-3, lr=0.025)
    generator = torch.Generator().manual_seed(0)
    losses, worst = torch.tensor([1.0, 2.0, 0.5]), 0.0
    for _ in range(100):
        leaf = losses.clone().requires_grad_()
        theirs.get_weighted_loss(leaf)[0].backward()
        step = Step(np.eye(TASKS), np.ones(TASKS, dtype=bool), losses.double().numpy())
        worst = max(worst, relative(ours.weights(step), leaf.grad))
        losses = losses * (0.9 + 0.15 * torch.rand(TASKS, generator=generator))
        theirs.prev_loss = leaf.detach()
        theirs.update(losses)
        ours.feedback(losses.double().numpy())
    yield Row("`famo`", "FAMO `FAMO`", "task weights over 100 steps", f"relative difference ≤ {worst:.0e}")
