"""Losses by name. A label of -100 stands for a target that is not among the candidates: it adds nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ..data.samples import IGNORED


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Softmax over the candidates of an image (thesis, section 3.3.2)."""
    total = F.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def margin(scores: Tensor, labels: Tensor) -> Tensor:
    """Hinge: the target's score is to be 1 above that of every other candidate."""
    known = labels != IGNORED
    target = scores.gather(1, labels.clamp(min=0)[:, None])  # [batch, 1]
    others = (1 - target + scores).clamp(min=0).scatter(1, labels.clamp(min=0)[:, None], 0.0)
    return (others.sum(1) * known).sum() / known.sum().clamp(min=1)


def mse(cosine: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(cosine, target.to(cosine.dtype))


def hinge(cosine: Tensor, target: Tensor) -> Tensor:
    """1 - cosine for the true fact, the positive part of the cosine for a random one."""
    return ((1 - cosine) * target + cosine.clamp(min=0) * (1 - target)).mean()


CLASSIFIER_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": cross_entropy, "margin": margin}
SEARCH_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "hinge": hinge}
