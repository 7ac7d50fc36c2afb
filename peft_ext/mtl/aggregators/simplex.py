"""Minimise a smooth convex function over the probability simplex, to float64 accuracy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .base import Array


Derivatives = tuple[float, Array, Array]
BARRIER_START, BARRIER_END, BARRIER_FACTOR = 1e-1, 1e-14, 0.1
MAX_NEWTON_STEPS = 50


def minimise_on_simplex(function: Callable[[Array], Derivatives], size: int) -> Array:
    """
    `argmin f(w)` over `w >= 0, sum(w) = 1` by Newton's method with a logarithmic barrier (Boyd and Vandenberghe,
    Convex Optimization, chapter 11).

    Args:
        function: returns value, gradient `[size]` and Hessian `[size, size]` at `w`. Its values should be of the
            order of one, which the barrier's weight is measured against.
        size (`int`): number of weights.

    Returns:
        The minimiser, `[size]`, to about 1e-10.
    """
    w = np.full(size, 1.0 / size)
    if size == 1:
        return w
    barrier = BARRIER_START
    while barrier >= BARRIER_END:
        w = _centre(function, w, barrier)
        barrier *= BARRIER_FACTOR
    return w / w.sum()


def _centre(function: Callable[[Array], Derivatives], w: Array, barrier: float) -> Array:
    """Newton's method for `f(w) - barrier * sum(log w)` on the plane of constant sum."""
    size = len(w)
    kkt = np.ones((size + 1, size + 1))
    kkt[-1, -1] = 0.0
    for _ in range(MAX_NEWTON_STEPS):
        value, gradient, hessian = function(w)
        value -= barrier * np.log(w).sum()
        gradient = gradient - barrier / w
        # Steps are taken in units of w: near a face its entries differ by ten orders of magnitude.
        kkt[:size, :size] = hessian * np.outer(w, w) + barrier * np.eye(size)
        kkt[size, :size] = kkt[:size, size] = w
        step = w * np.linalg.lstsq(kkt, np.append(-gradient * w, 0.0), rcond=None)[0][:size]
        decrease = -gradient @ step
        if decrease <= 1e-3 * barrier:  # the barrier's own error is size * barrier
            break
        length = min(1.0, 0.99 / max(1e-300, float(np.max(-step / w))))
        while length > 1e-12:
            new = w + length * step
            if function(new)[0] - barrier * np.log(new).sum() <= value - 0.1 * length * decrease:
                break
            length *= 0.5
        else:
            break
        w = new
    return w
