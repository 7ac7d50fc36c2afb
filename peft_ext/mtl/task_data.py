"""The tasks of a training set: their names, drawing from them, and what one optimiser step has of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .data import MIXED_SAMPLINGS, TaskCollator, TaskSampler, task_ids_of
from .losses import Window, batch_size_of, count_labels, fork_state, labels_of_tasks, restore_state
from .parallel import any_process, processes, sum_over_processes


if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


def refuse_packing(config: Any) -> None:
    """
    Raises:
        `ValueError`: if TRL is told to put several samples into one row.
    """
    for option in ("packing", "padding_free"):
        if getattr(config, option, False):
            raise ValueError(
                f"{option}=True puts samples of several tasks into one row, which cannot be taken apart by task; set "
                "packing=False and padding_free=False."
            )


class TaskDataMixin(_Trainer):
    """Part of [`MTLTrainerMixin`]: data."""

    _make_aggregator: Any
    compute_task_losses: Any
    _splits: bool
    _task_names: list[str] | None
    _gradients: Any
    _task_losses: Any

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
        refuse_packing(config)
        if config.task_sampling not in MIXED_SAMPLINGS and config.mtl_method != "joint":
            window = config.gradient_accumulation_steps
            if window % len(self._task_names):
                raise ValueError(
                    f"task_sampling={config.task_sampling!r} gives a micro-batch one task, so mtl_method="
                    f"{config.mtl_method!r} needs every task's in a step: set gradient_accumulation_steps to a "
                    f"multiple of {len(self._task_names)}, not {window}."
                )
        self.data_collator: Any = TaskCollator(self.data_collator, config.task_column)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for name in (self.args.task_column, *(self.label_names or ())):
            if name not in self._signature_columns:
                self._signature_columns.append(name)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self._splits:
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
        if batches:
            if self._task_names is None:
                self._name_tasks(batches[0])
            if self._gradients is not None:
                self._gradients.clear()
            self._window = self._measure(batches, device)
        return batches, num_items

    def _measure(self, batches: list[Any], device: Any) -> Window:
        counts = torch.stack([self._counts_of(batch) for batch in batches])  # [micro-batches, tasks]
        num_items: dict[int, Any] = {}
        if self._splits:
            column = self.args.task_column
            for task in range(len(self.task_names)):
                # Each task's part of every batch: Trainer counts its labels, over all processes.
                parts = [
                    {k: v[b[column] == task] for k, v in b.items() if k in ("labels", "shift_labels")} for b in batches
                ]
                num_items[task] = self._get_num_items_in_batch(parts, device)
        totals = sum_over_processes(counts.sum(dim=0).to(device)).cpu()
        if self.args.task_loss_scale == "window":
            num_items = {task: totals[task] / processes() for task in range(len(totals))}
        anywhere = any_process((counts > 0).to(device)).cpu()
        return Window(counts, totals, anywhere, num_items)

    def _counts_of(self, batch: Mapping[str, Any]) -> Tensor:
        """Labels of each task in a micro-batch, float64 `[tasks]`."""
        tasks = self.task_names
        if self._splits:
            return torch.bincount(batch[self.args.task_column].cpu(), minlength=len(tasks)).double()
        size = batch_size_of(batch)
        names = labels_of_tasks(self.label_names or [], tasks)
        if names is None or not all(name in batch for name in names):
            return torch.full((len(tasks),), float(size), dtype=torch.float64)
        return torch.tensor([count_labels(batch[name], size) for name in names], dtype=torch.float64)

    def _name_tasks(self, batch: Any) -> None:
        """Learn the tasks' names from the losses of one batch, leaving the random streams as they were."""
        if self.args.task_loss_scale == "window" or processes() > 1:
            raise ValueError("Set task_names in the config: they are needed before the first losses are computed.")
        model = self.accelerator.unwrap_model(self.model)
        training, streams = model.training, fork_state(self.args.device)
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = self.compute_task_losses(model, self._prepare_inputs(batch))
        model.train(training)
        restore_state(streams, self.args.device)
        self._task_names = list(losses)
        self._make_aggregator()
