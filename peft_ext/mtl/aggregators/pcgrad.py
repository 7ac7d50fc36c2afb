"""PCGrad: project each task's gradient onto the normal planes of those it conflicts with."""

from __future__ import annotations

import numpy as np
import torch

from .base import Aggregator, Array, Step


class PCGrad(Aggregator):
    """
    Gradient surgery.

    Paper: Yu et al., [Gradient Surgery for Multi-Task Learning](https://arxiv.org/abs/2001.06782), algorithm 1.

    Every projected gradient is a combination of the original ones. Its coefficients are tracked, and the projections
    are computed from the Gramian. The other tasks are visited in random order. The published code sums the projected
    gradients.
    """

    def solve(self, gramian: Array, step: Step) -> Array:
        tasks = len(gramian)
        coefficients = np.eye(tasks)  # row i: the projected gradient of task i in terms of all gradients
        for i in range(tasks):
            for j in torch.randperm(tasks, generator=self.generator).tolist():
                if i == j:
                    continue
                product = coefficients[i] @ gramian[:, j]
                if product < 0:
                    coefficients[i, j] -= product / gramian[j, j]
        return coefficients.sum(axis=0) * self.mean_scale(step)
