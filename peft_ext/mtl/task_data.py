"""The tasks of a training set: their names, drawing from them, and what one optimiser step has of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..sparse.sharded import is_sharded
from .data import MIXED_SAMPLINGS, TaskCollator, TaskSampler, task_ids_of
from .losses import Window, count_labels_by_id, count_labels_of_tasks, fork_state, restore_state
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
    _one_task_per_sample: bool
    _task_names: list[str] | None
    _gradients: Any
    _task_losses: Any
    _seen: Any

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
        self.data_collator: Any = TaskCollator(self.data_collator, config.task_column)

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

    def _measure(self, batches: list[Any], device: Any) -> Window:
        counts = torch.stack([self._counts_of(batch) for batch in batches])  # [micro-batches, tasks]
        num_items: dict[int, Any] = {}
        if self._splits:
            column = self.args.task_column
            for task in range(len(self.task_names)):
                # Each task's part of every batch: Trainer counts its labels, over all processes.
                parts = [
                    {k: _part(v, b[column] == task) for k, v in b.items() if k in ("labels", "shift_labels")}
                    for b in batches
                ]
                num_items[task] = self._get_num_items_in_batch(parts, device)
        totals = sum_over_processes(counts.sum(dim=0).to(device)).cpu()
        if self.args.task_loss_scale == "window":
            num_items = {task: totals[task] / processes() for task in range(len(totals))}
        anywhere = any_process((counts > 0).to(device)).cpu()
        if any(is_sharded(parameter) for parameter in self.model.parameters()):
            idle = any_process((counts.sum(dim=1) == 0).to(device)).cpu()
            if bool((idle & anywhere.any(dim=1)).any()):
                raise ValueError(
                    "A micro-batch of one process has no label of any task, and with FSDP2 every process must make "
                    "the same passes: leave samples without labels out."
                )
        return Window(counts, totals, anywhere, num_items)

    def _counts_of(self, batch: Mapping[str, Any]) -> Tensor:
        """Labels of each task in a micro-batch, float64 `[tasks]`."""
        tasks = self.task_names
        column = self.args.task_column
        names = [name for name in self.label_names or () if name != column]
        if self._one_task_per_sample:
            if getattr(self, "_loss_shifts_labels", False) and names == ["labels"] and "labels" in batch:
                batch = {**batch, "labels": batch["labels"][..., 1:]}
            return count_labels_by_id(batch, names, batch[column], len(tasks))
        return count_labels_of_tasks(batch, names, tasks)

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


def _part(labels: Any, rows: Tensor) -> Any:
    """The labels of some samples; of a packed row, whose samples are of one task, all or none."""
    if len(labels) == len(rows):
        return labels[rows]
    return labels if bool(rows.all()) else labels[:0]
