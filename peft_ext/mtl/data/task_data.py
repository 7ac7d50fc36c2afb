"""The tasks of a training set: their names, the order in which their samples are drawn, and how they are collated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor

from ..parallel import processes
from .collation import PARTS, TaskCollator
from .datasets import MIXED_SAMPLINGS, TaskSampler, concatenate_tasks, task_ids_of


if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


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
        self._from_dict = False

    @property
    def names(self) -> list[str]:
        """Names of the tasks, in the order of their numbers."""
        if self.known is None:
            raise ValueError("The tasks are not known before the first batch; set task_names in the config.")
        return self.known

    def take_datasets(self, train_dataset: Any, eval_dataset: Any, has_function: bool) -> Any:
        """
        The training set as one data set, with task numbers if it is a dict. `has_function`: whether
        `compute_task_losses_func` is given.

        Raises:
            `ValueError`: if TRL would pack samples of several tasks into one row, or the config names other tasks.
        """
        column = self.config.task_column
        if not has_function or column in (self.config.label_names or ()):
            self._refuse_packing(train_dataset, eval_dataset)
        self._from_dict = isinstance(train_dataset, dict)
        if not self._from_dict:
            return train_dataset
        names = list(train_dataset)
        if self.known not in (None, names):
            raise ValueError(f"task_names={self.known} differ from the training sets' names {names}.")
        self.known = names
        return concatenate_tasks(train_dataset, column)

    def _refuse_packing(self, train_dataset: Any, eval_dataset: Any) -> None:
        config = self.config
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
                    f"{option}=True puts samples of several tasks into one row, which cannot be taken apart by task; "
                    f"set {option}=False. padding_free=True makes one row of each task's samples in a batch."
                )

    def take_samples(self, dataset: Any, label_names: Sequence[str], batch_size: int, has_function: bool) -> None:
        """
        Find out whether samples of the training set have one task each, which is drawn and collated by task then. The
        tasks are named by their numbers if they have no names yet. `has_function`: whether `compute_task_losses_func`
        is given.

        Raises `ValueError` if a number is not one of a task, or the options cannot give a step every task.
        """
        column = self.config.task_column
        has_ids = column in label_names
        if self._from_dict and has_function and not has_ids:
            raise ValueError(
                "compute_task_losses_func cannot tell the samples of a dict of data sets apart: add "
                f"{column!r} to label_names, so that its `labels` have every sample's task number, or "
                "leave the function out, and batches are taken apart by task."
            )
        ids = task_ids_of(dataset, column) if has_ids or not has_function else None
        if ids is None:
            return
        count = int(ids.max()) + 1
        self.one_per_sample, self.splits = True, not has_function
        self.known = names = self.known or [str(task) for task in range(count)]
        if count > len(names) or int(ids.min()) < 0:
            raise ValueError(
                f"Column {column!r} holds numbers from {int(ids.min())} to {count - 1}, and there are "
                f"{len(names)} tasks: {names}."
            )
        self._check_sampling(batch_size)

    def _check_sampling(self, batch_size: int) -> None:
        config, names = self.config, self.names
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


class TaskDataHooks(_Trainer):
    """`Trainer`'s methods that load data. They have no state but `task_data`."""

    task_data: TaskData

    def task_collator(self, training: bool = True) -> TaskCollator:
        """
        What the trainer's data loaders collate with: `data_collator` on the samples of each task. For data loaders of
        your own.

        Args:
            training (`bool`, *optional*, defaults to `True`): whether for training, else for evaluation.
        """
        return self.task_data.collator(self.data_collator, training)

    def _loader(self, make: Callable[[], Any], training: bool) -> Any:
        own, collator = self.data_collator, self.task_collator(training)
        self.data_collator: Any = collator
        try:
            loader = make()
        finally:
            self.data_collator = own
        collator.is_dispatched = isinstance(loader, DataLoaderDispatcher)
        if training and self.task_data.splits:
            collator.refuse_dispatch()
        return loader

    def get_train_dataloader(self) -> Any:
        """Trainer's, with batches collated task by task."""
        return self._loader(super().get_train_dataloader, training=True)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with batches that are collated task by task too."""
        return self._loader(partial(super().get_eval_dataloader, *args, **kwargs), training=False)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with batches that are collated task by task too."""
        return self._loader(partial(super().get_test_dataloader, *args, **kwargs), training=False)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.task_data.one_per_sample:
            return super()._get_train_sampler(train_dataset)
        ids = task_ids_of(self.train_dataset if train_dataset is None else train_dataset, self.args.task_column)
        assert ids is not None
        return self.task_data.sampler(ids, self._train_batch_size)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for name in (self.args.task_column, *(self.label_names or ())):
            if name not in self._signature_columns:
                self._signature_columns.append(name)

    def floating_point_ops(self, inputs: Any) -> int:
        """Trainer's, of all parts."""
        return super().floating_point_ops(self._counted(inputs))

    def _track_num_input_tokens(self, inputs: Any) -> None:
        super()._track_num_input_tokens(self._counted(inputs))

    def _counted(self, inputs: Any) -> Any:
        """The tensors that `Trainer` counts tokens by; of a batch in parts, as one."""
        if PARTS not in inputs:
            return inputs
        parts = list(inputs[PARTS].values())
        return {
            name: torch.cat([part[name].reshape(-1) for part in parts])
            for name in (getattr(self.model, "main_input_name", "input_ids"), "attention_mask")
            if all(isinstance(part.get(name), Tensor) for part in parts)
        }
