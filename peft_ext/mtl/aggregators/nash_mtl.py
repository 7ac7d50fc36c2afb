"""Nash-MTL: the bargaining solution, every task's relative gain being equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .base import Aggregator, Array, Step


MAX_NEWTON_STEPS = 200
RIDGE = 1e-8


class NashMTL(Aggregator):
    """
    The Nash bargaining solution between tasks: `αᵢ (G α)ᵢ = 1` for every task.

    Paper: Navon et al., [Multi-Task Learning as a Bargaining Game](https://arxiv.org/abs/2202.01017).

    The weights `α` are the stationary point of `½ αᵀGα − Σ log αᵢ`, which is strictly convex. Newton's method finds it
    in float64 within a millisecond; the published code solves a sequence of convex programs. The norm of the direction
    is always `√T`, so the default `max_norm=1` always clips to a step of norm one.

    Args:
        max_norm (`float`, *optional*, defaults to 1.0):
            Clip the direction to this norm; 0 leaves it.
        update_weights_every (`int`, *optional*, defaults to 1):
            Keep the weights for this many steps.
        **kwargs: see [`Aggregator`].
    """

    weights_heads = True

    def __init__(self, max_norm: float = 1.0, update_weights_every: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not max_norm >= 0:
            raise ValueError(f"max_norm={max_norm!r} must be at least 0; 0 does not clip.")
        if update_weights_every < 1 or update_weights_every != int(update_weights_every):
            raise ValueError(f"update_weights_every={update_weights_every!r} must be a whole number, at least 1.")
        self.max_norm = max_norm
        self.update_weights_every = update_weights_every
        self.age = 0
        self.held: tuple[list[int], list[float]] | None = None  # active tasks and their weights

    def solve(self, gramian: Array, step: Step) -> Array:
        active = step.active.tolist()
        if self.held is None or self.held[0] != active or self.age >= self.update_weights_every:
            self.held = active, bargain(gramian).tolist()
            self.age = 0
        self.age += 1
        return np.array(self.held[1])

    def weights(self, step: Step) -> Array:
        weights = super().weights(step)
        norm = np.sqrt(max(0.0, float(weights @ step.gramian @ weights)))
        return weights * (self.max_norm / norm) if 0 < self.max_norm < norm else weights

    def head_weights(self, step: Step, weights: Array | None) -> Array:
        # Unclipped: published code clips the shared parameters' gradient alone. A task without a shared gradient still
        # trains its head.
        full = np.where(step.present, 1.0, 0.0)
        if self.held is not None:
            full[self.held[0]] = self.held[1]
        return full

    def state_dict(self) -> dict[str, Any]:
        held = None if self.held is None else [self.held[0], torch.tensor(self.held[1], dtype=torch.float64)]
        return {**super().state_dict(), "age": self.age, "held": held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.age = state["age"]
        self.held = None if state["held"] is None else (list(state["held"][0]), state["held"][1].tolist())


def bargain(gramian: Array) -> Array:
    """
    Solve `αᵢ (G α)ᵢ = 1`, `α > 0`.

    Where zero lies inside the hull of the gradients no solution exists; a ridge of 1e-8 of the trace then gives
    weights whose direction is about zero, as it should be at such a point.
    """
    norms = np.sqrt(np.diagonal(gramian))
    cosines = gramian / np.outer(norms, norms)  # α's unit is one over the gradient's norm
    alpha = _newton(cosines)
    if alpha is None:
        alpha = _newton(cosines + RIDGE * np.eye(len(norms)))
    if alpha is None:
        return np.zeros(len(norms))
    return alpha / norms


def _newton(gramian: Array) -> Array | None:
    """Damped Newton on a self-concordant function: step length `1 / (1 + decrement)` until it is small."""
    alpha = np.full(len(gramian), 1.0 / np.sqrt(len(gramian)))
    for _ in range(MAX_NEWTON_STEPS):
        # In units of α, the barrier's Hessian is the identity.
        gradient = alpha * (gramian @ alpha) - 1.0
        if np.abs(gradient).max() < 1e-13:
            return alpha
        hessian = gramian * np.outer(alpha, alpha) + np.eye(len(alpha))
        try:
            step = np.linalg.solve(hessian, -gradient)
        except np.linalg.LinAlgError:
            return None
        decrement = np.sqrt(max(0.0, float(-gradient @ step)))
        alpha = alpha * (1.0 + (step if decrement < 0.25 else step / (1.0 + decrement)))
        if not np.isfinite(alpha).all() or alpha.max() > 1e9:
            return None
    return alpha if np.abs(alpha * (gramian @ alpha) - 1.0).max() < 1e-8 else None
