"""Base of all aggregators: exclusion of empty rows, scale, random stream and state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


Array: TypeAlias = npt.NDArray[np.float64]
REDUCTIONS = ("mean", "reference")


@dataclass(frozen=True)
class Step:
    """
    One optimiser step, as an aggregator sees it.

    Attributes:
        gramian (`np.ndarray`): inner products of the tasks' gradients, float64 `[tasks, tasks]`.
        present (`np.ndarray`): which tasks have a loss in this step, bool `[tasks]`.
        losses (`np.ndarray`): the tasks' losses, float64 `[tasks]`; NaN where unknown or absent.
    """

    gramian: Array
    present: npt.NDArray[np.bool_]
    losses: Array

    @property
    def active(self) -> npt.NDArray[np.intp]:
        """Numbers of the tasks that take part: present, with a gradient that is not zero."""
        return np.flatnonzero(self.present & (np.diagonal(self.gramian) > 0))


class Aggregator:
    """
    Base class of the methods that combine the gradients of several tasks into one direction.

    Most methods compute one weight per task from the Gramian (the inner products of the gradients). They implement
    `solve`. Methods that look at single coordinates set `needs_rows` and implement `combine`.

    Args:
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"`: the direction has the scale of the mean of the tasks' gradients. `"reference"`: it has the scale
            of the method's published code. It makes no difference to MGDA, IMTL-G, Nash-MTL and FAMO, which define
            their scale themselves.
        seed (`int`, *optional*, defaults to 0):
            Seed of the method's own random stream. The global stream is never used, so that dropout does not depend on
            the method.

    Attributes:
        needs_rows (`bool`):
            Whether the method needs the whole gradients, not only their Gramian.
        weights_heads (`bool`):
            Whether the weights apply to the parameters of a single task too.
        needs_feedback (`bool`):
            Whether `feedback` needs the losses after the optimiser's step.
    """

    needs_rows: ClassVar[bool] = False
    weights_heads: ClassVar[bool] = False
    needs_feedback: ClassVar[bool] = False

    def __init__(self, reduction: str = "mean", seed: int = 0) -> None:
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction!r} is not known; choose one of {', '.join(REDUCTIONS)}.")
        self.reduction = reduction
        self.generator = torch.Generator().manual_seed(seed)

    def solve(self, gramian: Array, step: Step) -> Array:
        """
        Weights `[active]` of the active tasks, at the scale of `reduction`, from their Gramian `[active, active]`.
        """
        raise NotImplementedError

    def combine(self, rows: Tensor, step: Step) -> Tensor:
        """Direction `[parameters]` from the gradients `[active, parameters]` of the active tasks."""
        raise NotImplementedError

    def weights(self, step: Step) -> Array:
        """Weights `[tasks]` of all tasks. They are zero for tasks that are absent or have no gradient."""
        weights = np.zeros(len(step.gramian))
        active = step.active
        if len(active):
            weights[active] = self.solve(step.gramian[np.ix_(active, active)], step)
        return weights

    def head_weights(self, step: Step, weights: Array | None) -> Array:
        """Factors `[tasks]` for the gradients of parameters that belong to one task."""
        if self.weights_heads and weights is not None:
            return weights
        share = 1.0 / max(1, int(step.present.sum())) if self.reduction == "mean" else 1.0
        return np.where(step.present, share, 0.0)

    def mean_scale(self, step: Step) -> float:
        """Factor that scales a sum over tasks to the scale of `reduction`."""
        return 1.0 / int(step.present.sum()) if self.reduction == "mean" else 1.0

    def feedback(self, losses: Array) -> None:
        """Receive the losses `[tasks]` of the same batch after the optimiser's step."""

    def state_dict(self) -> dict[str, Any]:
        """All that later steps depend on, as tensors and plain values."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, bit for bit."""
        self.generator.set_state(state["generator"])
