"""Multi-task training: gradients task by task, combined by one of many methods, with their conflicts on record."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .aggregators import METHODS, Aggregator, TorchJDAggregator, make_aggregator
from .gradients.gramian import aggregate


if TYPE_CHECKING:
    from .callback import GradientConflictCallback, log_gradient_conflicts
    from .config import MTLArguments, MTLConfig
    from .conflicts.recorder import ConflictRecorder, conflict_incidence
    from .metrics import relative_task_drop
    from .sft import MTLSFTConfig, MTLSFTTrainer
    from .trainer import MTLTrainer, MTLTrainerMixin

# Imported on first use: they pull in transformers' Trainer, TRL or matplotlib.
_LAZY = {
    "ConflictRecorder": "conflicts.recorder",
    "GradientConflictCallback": "callback",
    "MTLArguments": "config",
    "MTLConfig": "config",
    "MTLSFTConfig": "sft",
    "MTLSFTTrainer": "sft",
    "MTLTrainer": "trainer",
    "MTLTrainerMixin": "trainer",
    "conflict_incidence": "conflicts.recorder",
    "log_gradient_conflicts": "callback",
    "relative_task_drop": "metrics",
}

__all__ = [
    "METHODS",
    "Aggregator",
    "ConflictRecorder",
    "GradientConflictCallback",
    "MTLArguments",
    "MTLConfig",
    "MTLSFTConfig",
    "MTLSFTTrainer",
    "MTLTrainer",
    "MTLTrainerMixin",
    "TorchJDAggregator",
    "aggregate",
    "conflict_incidence",
    "log_gradient_conflicts",
    "make_aggregator",
    "relative_task_drop",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
