"""Joint training: the mean of the tasks' gradients."""

from __future__ import annotations

import numpy as np

from .base import Aggregator, Array, Step


class Joint(Aggregator):
    """
    Equal weights: the mean of the losses, or their sum with `reduction="reference"`. This is the baseline of every
    comparison, and often hard to beat.

    Paper: Kurin et al., [In Defense of the Unitary Scalarization for Deep Multi-Task
    Learning](https://arxiv.org/abs/2201.04122).
    """

    def solve(self, gramian: Array, step: Step) -> Array:
        return np.full(len(gramian), self.mean_scale(step))
