"""Multi-task training: gradients task by task, combined by one of many methods, with their conflicts on record."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .aggregators import METHODS, Aggregator, TorchJDAggregator, make_aggregator
from .gramian import aggregate


if TYPE_CHECKING:
    pass

# Imported on first use: they pull in transformers' Trainer, TRL or matplotlib.
_LAZY: dict[str, str] = {}

__all__ = ["METHODS", "Aggregator", "TorchJDAggregator", "aggregate", "make_aggregator"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
