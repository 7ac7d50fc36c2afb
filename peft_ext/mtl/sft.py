"""TRL's `SFTTrainer` for several tasks."""

from __future__ import annotations

from dataclasses import dataclass

from ..extras import needs
from .config import MTLArguments
from .trainer import MTLTrainerMixin


with needs("trl"):
    from trl import SFTConfig, SFTTrainer


@dataclass
class MTLSFTConfig(MTLArguments, SFTConfig):
    """
    Arguments of [`MTLSFTTrainer`]: TRL's `SFTConfig`, and the options of multi-task training that [`MTLConfig`] lists.

    Example:

        ```py
        >>> from peft_ext.mtl import MTLSFTConfig

        >>> config = MTLSFTConfig(output_dir="out", mtl_method="pcgrad", max_length=512)
        ```
    """


class MTLSFTTrainer(MTLTrainerMixin, SFTTrainer):
    """
    TRL's `SFTTrainer` for several tasks. Each sample passes through the model once, so that a gradient per task costs
    little.

    Args:
        *args, **kwargs:
            As for `SFTTrainer`, with an [`MTLSFTConfig`] as `args`. `train_dataset` is a dict with one data set per
            task, or a data set with a column `task_ids`.
        compute_task_losses_func (`Callable`, *optional*):
            As for [`MTLTrainer`].
        aggregator ([`Aggregator`], *optional*):
            A method of your own, in place of `mtl_method`.

    Raises:
        `ValueError`: With `packing=True`, because its rows hold samples of several tasks. Use `padding_free=True`,
            which makes one row of each task's samples.

    Usage:

        ```python
        from peft_ext import NeuroAdaConfig
        from peft_ext.mtl import MTLSFTConfig, MTLSFTTrainer

        trainer = MTLSFTTrainer(
            model="meta-llama/Llama-3.2-1B",
            args=MTLSFTConfig(output_dir="out", mtl_method="pcgrad"),
            train_dataset={"summaries": summaries, "questions": questions},
            peft_config=NeuroAdaConfig(k=1),
        )
        trainer.train()
        ```
    """
