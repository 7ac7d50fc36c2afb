"""MGDA: the shortest vector in the convex hull of the tasks' gradients."""

from __future__ import annotations

import numpy as np

from .base import Aggregator, Array, Step
from .simplex import Derivatives, minimise_on_simplex


class MGDA(Aggregator):
    """
    Multiple-gradient descent.

    Papers: Désidéri, *Multiple-gradient descent algorithm (MGDA) for multiobjective optimization* (2012); Sener and
    Koltun, [Multi-Task Learning as Multi-Objective Optimization](https://arxiv.org/abs/1810.04650).

    The weights are non-negative and sum to one. The direction `d` satisfies `d · gᵢ >= ‖d‖²` for every task. It is
    solved to float64 accuracy. Frank-Wolfe, which published code uses, stops 0.3 % away.
    """

    def solve(self, gramian: Array, step: Step) -> Array:
        scaled = gramian / np.trace(gramian)

        def half_norm(w: Array, barrier: float) -> Derivatives:
            image = scaled @ w
            return float(0.5 * w @ image), image, scaled

        smallest = float(np.diagonal(scaled).min())  # the direction is at most as long as the shortest gradient
        return minimise_on_simplex(half_norm, len(gramian), end=1e-14 * smallest)
