"""Methods that combine the gradients of several tasks, by name."""

from __future__ import annotations

import inspect
from typing import Any

from .base import REDUCTIONS, Aggregator, Step
from .cagrad import CAGrad
from .famo import FAMO
from .graddrop import GradDrop
from .imtl_g import IMTLG
from .joint import Joint
from .mgda import MGDA
from .nash_mtl import NashMTL
from .pcgrad import PCGrad
from .torchjd import METHODS as TORCHJD_METHODS
from .torchjd import TorchJDAggregator, make_torchjd


OWN_METHODS: dict[str, type[Aggregator]] = {
    "joint": Joint,
    "pcgrad": PCGrad,
    "cagrad": CAGrad,
    "graddrop": GradDrop,
    "mgda": MGDA,
    "imtl_g": IMTLG,
    "nash_mtl": NashMTL,
    "famo": FAMO,
}
METHODS = (*OWN_METHODS, *TORCHJD_METHODS)


def make_aggregator(method: str, num_tasks: int, /, **kwargs: Any) -> Aggregator:
    """
    Build an aggregator by name.

    Args:
        method (`str`):
            One of `METHODS`.
        num_tasks (`int`):
            Number of tasks.
        **kwargs:
            Options of the method, and `reduction` and `seed` of [`Aggregator`].

    Raises:
        `ValueError`: If the method is not known, or has no such option.
        `ImportError`: If the method comes from TorchJD, which is not installed.
    """
    if method in TORCHJD_METHODS:
        if method == "constant":  # the only one with weights per task
            _check_weights(kwargs.get("weights"), num_tasks)
        return make_torchjd(method, **kwargs)
    if method not in OWN_METHODS:
        raise ValueError(f"method={method!r} is not known; choose one of {', '.join(METHODS)}.")
    cls = OWN_METHODS[method]
    known = {"reduction", "seed", *inspect.signature(cls.__init__).parameters} - {"self", "kwargs", "num_tasks"}
    unknown = sorted(set(kwargs) - known)
    if unknown:
        raise ValueError(f"method={method!r} has no option {unknown[0]!r}; it has {', '.join(sorted(known))}.")
    if cls is FAMO:
        kwargs["num_tasks"] = num_tasks
    try:
        return cls(**kwargs)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"method={method!r} does not take the options {kwargs!r}: {error}") from error


def _check_weights(weights: Any, num_tasks: int) -> None:
    if weights is None or len(weights) != num_tasks:
        raise ValueError(f"method='constant' needs weights=[...] with one entry for each of the {num_tasks} tasks.")


__all__ = [
    "METHODS",
    "OWN_METHODS",
    "REDUCTIONS",
    "TORCHJD_METHODS",
    "Aggregator",
    "Step",
    "TorchJDAggregator",
    "make_aggregator",
]
