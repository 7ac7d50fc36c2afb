"""FAMO: task weights learnt from how fast each loss falls."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import Aggregator, Array, Step


EPS = 1e-8


class FAMO(Aggregator):
    """
    Fast adaptive multi-task optimisation.

    Paper: Liu et al., [FAMO: Fast Adaptive Multitask Optimization](https://arxiv.org/abs/2306.03792), algorithm 1.

    The direction is the gradient of `Σ zᵢ log(ℓᵢ − minᵢ) / c` with `z = softmax(ξ)` and `c = Σ zᵢ / (ℓᵢ − minᵢ)`, so
    that the weights sum to one. After the optimiser's step, `ξ` moves by Adam against the change of the log losses on
    the same batch. In [`MTLTrainer`] that second forward pass replays the random numbers of the first.

    Args:
        num_tasks (`int`): number of tasks.
        lr (`float`, *optional*, defaults to 0.025): of Adam on the logits ξ.
        gamma (`float`, *optional*, defaults to 1e-3): decay of the logits. Published runs use 1e-5 to 1e-2.
        min_losses (`list[float]`, *optional*): lower bounds of the losses; zeros by default.
        **kwargs: see [`Aggregator`].
    """

    weights_heads = True
    needs_feedback = True

    def __init__(
        self,
        num_tasks: int,
        lr: float = 0.025,
        gamma: float = 1e-3,
        min_losses: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if min_losses is not None and len(min_losses) != num_tasks:
            raise ValueError(f"min_losses={min_losses!r} must have one entry for each of the {num_tasks} tasks.")
        self.min_losses = np.array(min_losses if min_losses is not None else [0.0] * num_tasks)
        self.logits = torch.zeros(num_tasks, dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.logits], lr=lr, weight_decay=gamma)
        self.before: Array | None = None  # losses of the last step, until their feedback arrives

    def solve(self, gramian: Array, step: Step) -> Array:
        known = ~np.isnan(step.losses)
        if not known[step.active].all():
            raise ValueError("method='famo' needs the tasks' losses; pass `losses` with one entry per task.")
        if len(step.losses) != len(self.logits):
            raise ValueError(f"FAMO was made for {len(self.logits)} tasks and got {len(step.losses)}.")
        self.before = step.losses.copy()
        weights = self._loss_weights(step, step.present & known)
        return weights[step.active]

    def head_weights(self, step: Step, weights: Array | None) -> Array:
        return self._loss_weights(step, step.present & ~np.isnan(step.losses))

    def _loss_weights(self, step: Step, tasks: np.ndarray[Any, Any]) -> Array:
        z = torch.softmax(self.logits.detach(), dim=0).numpy()
        ratio = np.zeros(len(z))
        ratio[tasks] = z[tasks] / self._above_minimum(step.losses)[tasks]
        total = ratio.sum()
        return ratio / total if total > 0 else ratio

    def _above_minimum(self, losses: Array) -> Array:
        return np.maximum(losses - self.min_losses, 0.0) + EPS

    def feedback(self, losses: Array) -> None:
        if self.before is None:
            return
        change = np.log(self._above_minimum(self.before)) - np.log(self._above_minimum(losses))
        self.before = None
        change = np.where(np.isfinite(change), change, 0.0)  # absent tasks
        softmax = torch.softmax(self.logits, dim=0)
        (gradient,) = torch.autograd.grad(softmax, self.logits, grad_outputs=torch.from_numpy(change))
        self.logits.grad = gradient
        self.optimizer.step()
        self.logits.grad = None

    def state_dict(self) -> dict[str, Any]:
        before: Tensor | None = None if self.before is None else torch.from_numpy(self.before)
        return {
            **super().state_dict(),
            "logits": self.logits.detach().clone(),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "before": before,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        with torch.no_grad():
            self.logits.copy_(state["logits"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.before = None if state["before"] is None else state["before"].numpy()
