"""Minimise a smooth convex function over the probability simplex, to float64 accuracy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .base import Array


Derivatives = tuple[float, Array, Array]
BARRIER_START, BARRIER_FACTOR = 1e-1, 0.1
MAX_NEWTON_STEPS = 50


def minimise_on_simplex(function: Callable[[Array, float], Derivatives], size: int, end: float) -> Array:
    """
    `argmin f(w)` over `w >= 0, sum(w) = 1` by Newton's method with a logarithmic barrier (Boyd and Vandenberghe,
    Convex Optimization, chapter 11).

    Args:
        function: returns value, gradient `[size]` and Hessian `[size, size]` at `w`, given the barrier's weight, in
            case it has a barrier of its own. Its values should be at most of the order of one.
        size (`int`): number of weights.
        end (`float`): the barrier's last weight. The value found is at most `size * end` above the minimum.

    Returns:
        The minimiser, `[size]`.
    """
    w = np.full(size, 1.0 / size)
    if size == 1:
        return w
    barrier = BARRIER_START
    while barrier > end:
        w = _centre(function, w, barrier)
        barrier = max(end, barrier * BARRIER_FACTOR)
    w = _centre(function, w, barrier)
    return w / w.sum()


def _centre(function: Callable[[Array, float], Derivatives], w: Array, barrier: float) -> Array:
    """Newton's method for `f(w) - barrier * sum(log w)` on the plane of constant sum."""
    size = len(w)
    kkt = np.ones((size + 1, size + 1))
    kkt[-1, -1] = 0.0
    for _ in range(MAX_NEWTON_STEPS):
        value, gradient, hessian = function(w, barrier)
        value -= barrier * np.log(w).sum()
        gradient = gradient - barrier / w
        # Steps are taken in units of w: near a face its entries differ by ten orders of magnitude.
        scaled = hessian * np.outer(w, w) + barrier * np.eye(size)
        unit = np.abs(scaled).max()
        kkt[:size, :size] = scaled / unit
        kkt[size, :size] = kkt[:size, size] = w
        step = w * np.linalg.lstsq(kkt, np.append(-gradient * w / unit, 0.0), rcond=None)[0][:size]
        decrease = -gradient @ step
        if decrease <= 1e-3 * barrier:  # the barrier's own error is size * barrier
            break
        length = min(1.0, 0.99 / max(1e-300, float(np.max(-step / w))))
        while length > 1e-12:
            new = w + length * step
            if function(new, barrier)[0] - barrier * np.log(new).sum() <= value - 0.1 * length * decrease:
                break
            length *= 0.5
        else:
            break
        w = new
    return w
