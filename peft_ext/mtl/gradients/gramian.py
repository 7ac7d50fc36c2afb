"""Inner products of the tasks' gradients, and directions made from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..aggregators import Aggregator, Step, make_aggregator
from ..aggregators.base import Array


CHUNK = 1 << 15  # coordinates that are raised to float64 at a time


def gramian_of(rows: Sequence[Tensor | None]) -> Tensor:
    """
    Inner products of rows given as flat tensors of one length, or `None` for zero rows.

    Returns:
        float64 `[rows, rows]` on the rows' device.
    """
    known = {i: row.reshape(-1) for i, row in enumerate(rows) if row is not None}
    if not known:
        return torch.zeros(len(rows), len(rows), dtype=torch.float64)
    any_row = next(iter(known.values()))
    part = torch.zeros(len(known), len(known), dtype=torch.float64, device=any_row.device)
    for start in range(0, any_row.numel(), CHUNK):
        block = torch.stack([row[start : start + CHUNK].double() for row in known.values()])
        part += block @ block.T
    gramian = part.new_zeros(len(rows), len(rows))
    gramian[np.ix_(list(known), list(known))] = part
    return gramian


def aggregate(
    jacobian: Tensor, method: str = "joint", *, losses: Tensor | Sequence[float] | None = None, **kwargs: Any
) -> Tensor:
    """
    Combine the gradients of several tasks into one direction.

    Args:
        jacobian (`torch.Tensor`):
            The gradient of one task per row, `[tasks, parameters]`, of any floating dtype. Rows of zeros take no part.
        method (`str`, *optional*, defaults to `"joint"`):
            One of `peft_ext.mtl.METHODS`.
        losses (`torch.Tensor`, *optional*):
            Losses of the tasks, `[tasks]`. FAMO needs them.
        **kwargs:
            Options of the method, such as `c=0.4` for `"cagrad"` or `max_norm=0` for `"nash_mtl"`; `reduction`
            (`"mean"`, or `"reference"` for the scale of the published code); `seed` of random methods.

    Returns:
        The direction `[parameters]`, in the dtype and on the device of the jacobian. Subtract it from the parameters.

    Raises:
        `ValueError`: If the jacobian is not a finite floating-point matrix, or the method or an option is not known.

    Example:

        ```py
        >>> import torch
        >>> from peft_ext.mtl import aggregate

        >>> aggregate(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), method="mgda")
        tensor([0., 1., 1.])
        ```
    """
    if not isinstance(jacobian, Tensor):
        raise ValueError(f"jacobian must be a tensor [tasks, parameters], not a {type(jacobian).__name__}.")
    if jacobian.ndim != 2 or not jacobian.is_floating_point() or not len(jacobian):
        raise ValueError(
            f"jacobian must be a floating-point matrix [tasks, parameters], not {tuple(jacobian.shape)} of "
            f"{jacobian.dtype}."
        )
    if not bool(jacobian.isfinite().all()):
        raise ValueError("jacobian holds values that are not finite; leave such a step out.")
    tasks = len(jacobian)
    aggregator = make_aggregator(method, tasks, **kwargs)
    given = np.full(tasks, np.nan) if losses is None else _losses(losses, tasks)
    jacobian = jacobian.detach()
    step = Step(gramian_of(list(jacobian)).cpu().numpy(), np.ones(tasks, dtype=bool), given)
    return direction_of(jacobian, aggregator, step)


def direction_of(rows: Tensor, aggregator: Aggregator, step: Step) -> Tensor:
    """The direction `[parameters]` that `aggregator` makes of `rows` `[tasks, parameters]`."""
    if aggregator.needs_rows:
        active = torch.as_tensor(step.active, device=rows.device)
        if not len(active):
            return torch.zeros_like(rows[0])
        raised = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
        return aggregator.combine(raised[active], step).to(rows.dtype)
    weights = torch.from_numpy(aggregator.weights(step)).to(rows.device)
    return (weights @ rows.double()).to(rows.dtype)


def _losses(losses: Tensor | Sequence[float], tasks: int) -> Array:
    values = torch.as_tensor(losses, dtype=torch.float64).detach().cpu().numpy()
    if values.shape != (tasks,):
        raise ValueError(f"losses must have one entry for each of the {tasks} tasks, not shape {values.shape}.")
    return values


def layer_of(name: str) -> str:
    """The block that a parameter belongs to: its name up to the first number, or its module's name."""
    parts = name.removeprefix("base_model.model.").split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1]) or name
