"""GradDrop: keep, per coordinate, the gradients of one sign."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Aggregator, Step


class GradDrop(Aggregator):
    """
    Gradient sign dropout, on the gradients of parameters.

    Paper: Chen et al., [Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign
    Dropout](https://arxiv.org/abs/2010.06808), algorithm 1.

    Each coordinate keeps its positive gradients with probability `P = ½ (1 + Σ gᵢ / Σ |gᵢ|)`, and otherwise its
    negative ones. The expectation is the sum of the rows.
    """

    needs_rows = True

    def combine(self, rows: Tensor, step: Step) -> Tensor:
        total = rows.sum(dim=0)  # [parameters]
        magnitude = rows.abs().sum(dim=0)
        positive = 0.5 * (1.0 + torch.where(magnitude > 0, total / magnitude, 0.0))
        # Drawn on the CPU: the same on every device, and the stream is part of the state.
        draw = torch.rand(rows.shape[1], generator=self.generator, dtype=torch.float64).to(rows.device)
        kept = torch.where(draw < positive, rows.clamp(min=0).sum(dim=0), rows.clamp(max=0).sum(dim=0))
        return kept * self.mean_scale(step)
