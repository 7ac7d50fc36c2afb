"""CAGrad: near the mean gradient, the direction that helps the worst-off task most."""

from __future__ import annotations

import numpy as np

from .base import Aggregator, Array, Step
from .simplex import Derivatives, minimise_on_simplex


SMOOTHING = 1e-18  # under the root, relative to the Gramian's trace: the norm is not smooth at zero


class CAGrad(Aggregator):
    """
    Conflict-averse gradient descent (Liu et al. 2021, https://arxiv.org/abs/2110.14048, Algorithm 1).

    `d = g₀ + c ‖g₀‖ / ‖g_w‖ · g_w`, with `g₀` the mean gradient and `w` on the simplex minimising
    `g_w · g₀ + c ‖g₀‖ ‖g_w‖`. Solved on the Gramian divided by its trace: the published code's solver depends on the
    scale of the gradients and falls back to equal weights outside norms of about 0.1 to 100.

    Args:
        c (`float`, *optional*, defaults to 0.4):
            Radius of the ball around the mean gradient, relative to its norm.
        **kwargs: see [`Aggregator`]. `reduction="reference"` multiplies by `T / (1 + c²)`, as the benchmark code of
            Nash-MTL does.
    """

    def __init__(self, c: float = 0.4, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        if not c >= 0:
            raise ValueError(f"c={c!r} must be at least 0: the radius of the ball around the mean gradient.")
        self.c = c

    def solve(self, gramian: Array, step: Step) -> Array:
        tasks = len(gramian)
        # The mean is over all present tasks, those with a zero gradient included.
        mean = np.full(tasks, 1.0 / int(step.present.sum()))
        scaled = gramian / np.trace(gramian)
        image_of_mean = scaled @ mean
        radius = self.c * np.sqrt(max(0.0, float(mean @ image_of_mean)))

        def objective(w: Array) -> Derivatives:
            image = scaled @ w
            norm = np.sqrt(w @ image + SMOOTHING)
            value = float(w @ image_of_mean + radius * norm)
            hessian = radius * (scaled / norm - np.outer(image, image) / norm**3)
            return value, image_of_mean + radius * image / norm, hessian

        w = minimise_on_simplex(objective, tasks)
        norm = np.sqrt(max(0.0, float(w @ scaled @ w)))
        weights = mean if norm <= 1e-8 else mean + radius / norm * w
        if self.reduction == "reference":
            weights = weights * step.present.sum() / (1 + self.c**2)
        return weights
