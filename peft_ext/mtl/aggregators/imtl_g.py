"""IMTL-G: the direction with equal projections onto all tasks' gradients."""

from __future__ import annotations

import numpy as np

from .base import Aggregator, Array, Step


class IMTLG(Aggregator):
    """
    The gradient part of impartial multi-task learning.

    Paper: Liu et al., [Towards Impartial Multi-task
    Learning](https://openreview.net/forum?id=IMPnRXEWpvr), equation 6.

    The weights sum to one and may be negative. Linearly dependent gradients are handled by the pseudo-inverse.
    """

    def solve(self, gramian: Array, step: Step) -> Array:
        norms = np.sqrt(np.diagonal(gramian))
        # In units of each gradient's norm: the projections asked for are then all one.
        weights = np.linalg.pinv(gramian / np.outer(norms, norms), rcond=1e-12, hermitian=True) @ np.ones(len(norms))
        weights = weights / norms
        total = weights.sum()
        if not abs(total) > 1e-12 * np.abs(weights).sum():  # no direction has equal projections: opposite gradients
            return np.zeros(len(norms))
        return weights / total
