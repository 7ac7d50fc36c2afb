"""The tasks of a training set: their names, drawing from them, and the batches that they are collated into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import DataLoaderDispatcher

from ..parallel import processes
from .collation import SOURCE, TaskCollator
from .datasets import MIXED_SAMPLINGS, TaskSampler, task_ids_of
from .losses import fork_state, restore_state


if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


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


class TaskDataMixin(_Trainer):
    """Part of [`MTLTrainerMixin`]: data."""

    _make_aggregator: Any
    compute_task_losses: Any
    _splits: bool
    _one_task_per_sample: bool
    _task_names: list[str] | None
    _gradients: Any
    _task_losses: Any
    _seen: Any
    _measure: Any

    @property
    def _train_data(self) -> Any:
        return getattr(self, "train_dataset", None)

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, in the order of their numbers."""
        if self._task_names is None:
            raise ValueError("The tasks are not known before the first batch; set task_names in the config.")
        return self._task_names

    def _take_names(self, names: list[str]) -> None:
        if self._task_names is None:
            self._task_names = names
        elif self._task_names != names:
            raise ValueError(f"task_names={self._task_names} differ from the training sets' names {names}.")

    def _prepare_split(self) -> None:
        """One task per sample: name the tasks, keep their column, and see that batches can be taken apart."""
        config = self.args
        ids = task_ids_of(self._train_data, config.task_column)
        assert ids is not None
        count = int(ids.max()) + 1
        self._task_names = self._task_names or [str(task) for task in range(count)]
        if count > len(self._task_names) or int(ids.min()) < 0:
            raise ValueError(
                f"Column {config.task_column!r} holds numbers from {int(ids.min())} to {count - 1}, and there are "
                f"{len(self._task_names)} tasks: {self._task_names}."
            )
        strategy = getattr(config, "train_sampling_strategy", "random")
        if strategy != "random":
            raise ValueError(
                f"train_sampling_strategy={strategy!r} has no effect where every sample belongs to one task: "
                "task_sampling decides in which order they are drawn. Leave it at 'random'."
            )
        together = self._train_batch_size * config.gradient_accumulation_steps * config.world_size
        if config.task_sampling == "mixed" and config.mtl_method != "joint" and together < len(self._task_names):
            raise ValueError(
                f"A step of {together} samples cannot have every one of {len(self._task_names)} tasks, which "
                f"mtl_method={config.mtl_method!r} combines: raise per_device_train_batch_size or "
                "gradient_accumulation_steps."
            )
        if config.task_sampling not in MIXED_SAMPLINGS and config.mtl_method != "joint":
            window = config.gradient_accumulation_steps
            if window % len(self._task_names):
                raise ValueError(
                    f"task_sampling={config.task_sampling!r} gives a micro-batch one task, so mtl_method="
                    f"{config.mtl_method!r} needs every task's in a step: set gradient_accumulation_steps to a "
                    f"multiple of {len(self._task_names)}, not {window}."
                )

    # ------------------------------------------------------------------ loading

    def task_collator(self, training: bool = True) -> TaskCollator:
        """
        What the trainer's data loaders collate with: `data_collator` on the samples of each task. For data loaders of
        your own.

        Args:
            training (`bool`, *optional*, defaults to `True`): whether for training, else for evaluation.
        """
        config = self.args
        return TaskCollator(
            self.data_collator,
            config.task_column,
            len(self.task_names) if self._one_task_per_sample else None,
            split=self._splits,
            whole=not training,
            # Halves of a batch are collated anew, and so is the last one without what fills it up.
            keep_samples=config.noise_floor_steps > 0 if training else processes() > 1,
        )

    def _loader(self, make: Callable[[], Any], training: bool) -> Any:
        own, collator = self.data_collator, self.task_collator(training)
        self.data_collator: Any = collator
        try:
            loader = make()
        finally:
            self.data_collator = own
        collator.is_dispatched = isinstance(loader, DataLoaderDispatcher)
        if training and self._splits:
            collator.refuse_dispatch()
        return loader

    def get_train_dataloader(self) -> Any:
        """Trainer's, with batches collated task by task."""
        return self._loader(super().get_train_dataloader, training=True)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with batches that are collated task by task too."""
        make = super().get_eval_dataloader
        return self._loader(lambda: make(*args, **kwargs), training=False)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with batches that are collated task by task too."""
        make = super().get_test_dataloader
        return self._loader(lambda: make(*args, **kwargs), training=False)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for name in (self.args.task_column, *(self.label_names or ())):
            if name not in self._signature_columns:
                self._signature_columns.append(name)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self._one_task_per_sample:
            return super()._get_train_sampler(train_dataset)
        config = self.args
        ids = task_ids_of(train_dataset if train_dataset is not None else self._train_data, config.task_column)
        assert ids is not None
        return TaskSampler(
            ids,
            len(self.task_names),
            config.task_sampling,
            self._train_batch_size,
            config.world_size,
            config.sampling_temperature,
            config.seed if config.data_seed is None else config.data_seed,
        )

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Collect the micro-batches of one optimiser step and count the labels of each task in them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_batch = 0
        self._window = None
        self._task_losses = None
        self._seen = torch.zeros(0 if self._task_names is None else len(self._task_names), dtype=torch.bool)
        self._returned = 0.0
        if batches:
            if self._task_names is None:
                self._name_tasks(batches[0])
                self._seen = torch.zeros(len(self.task_names), dtype=torch.bool)
            if self._gradients is not None:
                self._gradients.clear()
            self._window = self._measure(batches, device)
        return batches, num_items

    def _name_tasks(self, batch: Any) -> None:
        """Learn the tasks' names from the losses of one batch, leaving the random streams as they were."""
        if self.args.task_loss_scale == "window" or processes() > 1:
            raise ValueError("Set task_names in the config: they are needed before the first losses are computed.")
        model = self.accelerator.unwrap_model(self.model)
        training, streams = model.training, fork_state(self.args.device)
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            inputs = self._prepare_inputs(batch)
            inputs.pop(SOURCE, None)
            losses = self.compute_task_losses(model, inputs)
        model.train(training)
        restore_state(streams, self.args.device)
        self._task_names = list(losses)
        self._make_aggregator()
