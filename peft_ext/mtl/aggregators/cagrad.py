"""CAGrad: near the mean gradient, the direction that helps the worst-off task most."""

from __future__ import annotations

import numpy as np

from .base import Aggregator, Array, Step
from .simplex import Derivatives, minimise_on_simplex


ACCURACY = 1e-12  # of the smallest gradient's norm


class CAGrad(Aggregator):
    """
    Conflict-averse gradient descent.

    Paper: Liu et al., [Conflict-Averse Gradient Descent for Multi-task Learning](https://arxiv.org/abs/2110.14048),
    algorithm 1.

    The direction is `d = g₀ + c ‖g₀‖ / ‖g_w‖ · g_w`, with the mean gradient `g₀`. The weights `w` lie on the simplex
    and minimise `g_w · g₀ + c ‖g₀‖ ‖g_w‖`. They are solved on the Gramian divided by its trace. The solver of the
    published code depends on the scale of the gradients and falls back to equal weights outside norms of about 0.1 to
    100.

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
        root_of = factor(gramian / np.trace(gramian))
        scaled = root_of @ root_of.T
        norm_of_mean = np.sqrt(max(0.0, float(mean @ scaled @ mean)))
        weights = mean
        if self.c * norm_of_mean > 0:
            towards_mean = scaled @ mean / norm_of_mean
            end = ACCURACY * float(np.sqrt(np.diagonal(scaled).min()))

            def objective(w: Array, barrier: float) -> Derivatives:
                # ‖g_w‖ has a kink at zero, where Newton's method gets stuck. As the smallest `t >= ‖g_w‖`, with
                # `-c barrier log(t² - ‖g_w‖²)` and `t` eliminated, it is smooth.
                half = w @ root_of
                image = root_of @ half
                t, root = bound(float(half @ half), barrier)
                value = float(w @ towards_mean + self.c * (t - barrier * np.log(t)))
                hessian = self.c / t * (scaled - np.outer(image, image) / (t * root))
                return value, towards_mean + self.c / t * image, hessian

            w = minimise_on_simplex(objective, tasks, end)
            # Where `g_w` is zero, `g_w / t` still leads to the best point of the ball, inside it.
            half = w @ root_of
            t, _ = bound(float(half @ half), end)
            weights = mean + self.c * norm_of_mean / t * w
        if self.reduction == "reference":
            weights = weights * step.present.sum() / (1 + self.c**2)
        return weights


def factor(gramian: Array) -> Array:
    """
    `L` with `gramian = L Lᵀ`. Norms of sums that nearly cancel come from it to sixteen digits, and from the Gramian
    itself to eight.
    """
    norms = np.sqrt(np.diagonal(gramian))
    values, vectors = np.linalg.eigh(gramian / np.outer(norms, norms))
    # Smaller eigenvalues are rounding. Cosines nearer to -1 than that cannot be told from it.
    return norms[:, None] * vectors * np.sqrt(np.where(values > 4e-16 * len(values), values, 0.0))


def bound(squared_norm: float, slack: float) -> tuple[float, float]:
    """The `t` with `t² - ‖g‖² = 2 slack t`, and `t - slack`."""
    root = float(np.sqrt(max(0.0, squared_norm) + slack**2))
    return slack + root, root
