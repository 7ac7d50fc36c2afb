"""The tasks of a training set: their names, the order in which their samples are drawn, and how they are collated."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..parallel import processes
from .collation import TaskCollator
from .datasets import MIXED_SAMPLINGS, TaskSampler


def refuse_packing(config: Any, train_dataset: Any, eval_dataset: Any) -> None:
    """
    Raises:
        `ValueError`: if TRL is told to put several samples into one row before they are drawn, and they have tasks.
    """
    packing = getattr(config, "packing", False)
    eval_packing = getattr(config, "eval_packing", None)
    evaluated = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
    for option, is_on, datasets in (
        ("packing", packing, [train_dataset]),
        ("eval_packing", packing if eval_packing is None else eval_packing, evaluated),
    ):
        mixed = [d for d in datasets if config.task_column in (getattr(d, "column_names", None) or ())]
        if is_on and (mixed or (option == "packing" and isinstance(train_dataset, dict))):
            raise ValueError(
                f"{option}=True puts samples of several tasks into one row, which cannot be taken apart by task; set "
                f"{option}=False. padding_free=True makes one row of each task's samples in a batch."
            )


class TaskData:
    """
    The tasks of a trainer's data sets.

    Args:
        config ([`MTLArguments`]): the trainer's options.

    Attributes:
        known (`list[str]`, *optional*): names of the tasks; `None` before the first batch shows them.
        one_per_sample (`bool`): whether every sample has one task, under `task_column`.
        splits (`bool`): whether batches are taken apart by task.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.known: list[str] | None = list(config.task_names) if config.task_names else None
        self.one_per_sample = False
        self.splits = False

    @property
    def names(self) -> list[str]:
        """Names of the tasks, in the order of their numbers."""
        if self.known is None:
            raise ValueError("The tasks are not known before the first batch; set task_names in the config.")
        return self.known

    def take_names(self, names: list[str]) -> None:
        """
        Take the names of a dict of training sets.

        Raises:
            `ValueError`: if the config has other names.
        """
        if self.known is None:
            self.known = names
        elif self.known != names:
            raise ValueError(f"task_names={self.known} differ from the training sets' names {names}.")

    def take_samples(self, ids: Tensor, batch_size: int, splits: bool) -> None:
        """
        Take samples of one task each. Names the tasks by their numbers if they have no names yet.

        Args:
            ids (`torch.Tensor`): every sample's task, `[samples]`.
            batch_size (`int`): samples per micro-batch of one process.
            splits (`bool`): whether batches are taken apart by task.

        Raises:
            `ValueError`: if a number is not one of a task, or the options cannot give a step every task.
        """
        config, count = self.config, int(ids.max()) + 1
        self.one_per_sample, self.splits = True, splits
        self.known = names = self.known or [str(task) for task in range(count)]
        if count > len(names) or int(ids.min()) < 0:
            raise ValueError(
                f"Column {config.task_column!r} holds numbers from {int(ids.min())} to {count - 1}, and there are "
                f"{len(names)} tasks: {names}."
            )
        strategy = getattr(config, "train_sampling_strategy", "random")
        if strategy != "random":
            raise ValueError(
                f"train_sampling_strategy={strategy!r} has no effect where every sample belongs to one task: "
                "task_sampling decides in which order they are drawn. Leave it at 'random'."
            )
        if config.mtl_method == "joint":
            return
        window = config.gradient_accumulation_steps
        together = batch_size * window * config.world_size
        if config.task_sampling == "mixed" and together < len(names):
            raise ValueError(
                f"A step of {together} samples cannot have every one of {len(names)} tasks, which "
                f"mtl_method={config.mtl_method!r} combines: raise per_device_train_batch_size or "
                "gradient_accumulation_steps."
            )
        if config.task_sampling not in MIXED_SAMPLINGS and window % len(names):
            raise ValueError(
                f"task_sampling={config.task_sampling!r} gives a micro-batch one task, so mtl_method="
                f"{config.mtl_method!r} needs every task's in a step: set gradient_accumulation_steps to a "
                f"multiple of {len(names)}, not {window}."
            )

    def collator(self, data_collator: Any, training: bool) -> TaskCollator:
        """A collator that calls `data_collator` on the samples of each task, for training or for evaluation."""
        config = self.config
        return TaskCollator(
            data_collator,
            config.task_column,
            len(self.names) if self.one_per_sample else None,
            split=self.splits,
            whole=not training,
            # Halves of a batch are collated anew, and so is the last one without what fills it up.
            keep_samples=config.noise_floor_steps > 0 if training else processes() > 1,
        )

    def sampler(self, ids: Tensor, batch_size: int) -> TaskSampler:
        """The order in which samples with the task numbers `ids` `[samples]` are drawn."""
        config = self.config
        return TaskSampler(
            ids,
            len(self.names),
            config.task_sampling,
            batch_size,
            config.world_size,
            config.sampling_temperature,
            config.seed if config.data_seed is None else config.data_seed,
        )
