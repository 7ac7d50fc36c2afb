"""TRL's `SFTTrainer` for several tasks."""

from __future__ import annotations

from dataclasses import dataclass


try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError("MTLSFTTrainer needs TRL: run `pip install 'peft-ext[trl]'`.") from error

from .config import MTLArguments
from .trainer import MTLTrainerMixin


@dataclass
class MTLSFTConfig(MTLArguments, SFTConfig):
    """`SFTConfig` with the options of multi-task training; see [`MTLArguments`]."""


class MTLSFTTrainer(MTLTrainerMixin, SFTTrainer):
    """
    `SFTTrainer` for several tasks: pass `train_dataset` as a dict of one data set per task, or with a column
    `task_ids`. Each sample is passed through the model once, so that gradients per task cost little. See
    [`MTLTrainer`].

    Raises:
        `ValueError`: with `packing=True`, whose rows hold samples of several tasks. `padding_free=True` makes one row
            of each task's samples.
    """
