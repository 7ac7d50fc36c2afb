"""`Trainer` for several tasks: gradients task by task, combined once per optimiser step."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..sparse.bases.sharded import is_sharded
from .aggregators import Aggregator
from .conflicts.recorder import ConflictRecorder
from .data.collation import SOURCE
from .data.losses import StepLosses
from .data.task_counts import TaskCounts
from .data.task_data import TaskData, TaskDataHooks
from .evaluation import TaskEvaluation
from .gradients.feedback import Feedback
from .gradients.step import GradientStep
from .gradients.task_passes import LabelPasses, PartPasses, losses_and_outputs, names_of_losses
from .parallel import refuse_unsupported
from .state import MTLState, method_of, read_state, write_state


logger = logging.getLogger(__name__)


class MTLTrainerMixin(TaskDataHooks):
    """
    Multi-task training for any subclass of `Trainer`. Put it first among the base classes, and override
    `compute_task_losses` if you need to.

    Args:
        *args, **kwargs:
            As for the trainer. Its `args` must be of a class with the options of [`MTLArguments`].
        compute_task_losses_func, aggregator (*optional*):
            As for [`MTLTrainer`].

    Attributes:
        task_data ([`TaskData`]):
            Names of the tasks, and how their samples are drawn and collated.
        task_counts ([`TaskCounts`]):
            Counts of the tasks' labels.
        passes ([`PartPasses`] or [`LabelPasses`]):
            Forward and backward passes, task by task.
        step_losses ([`StepLosses`]):
            Losses of the current optimiser step.
        gradient_step ([`GradientStep`]):
            Collects, combines and writes back the gradients.
        mtl_state ([`MTLState`]):
            The part of a checkpoint that belongs to multi-task training: method, conflicts, gradients and records.

    Usage:

        ```python
        from peft_ext.mtl import MTLTrainerMixin


        class MyMTLTrainer(MTLTrainerMixin, MyTrainer):
            pass
        ```
    """

    def __init__(
        self,
        *args: Any,
        compute_task_losses_func: Callable[..., Mapping[str, Tensor]] | None = None,
        aggregator: Aggregator | None = None,
        **kwargs: Any,
    ) -> None:
        bound = inspect.signature(super().__init__).bind_partial(*args, **kwargs)
        given = bound.arguments
        config: Any = given.get("args")
        if not hasattr(config, "mtl_method"):
            raise ValueError(f"args must be an MTLConfig (or MTLSFTConfig), not {type(config).__name__}.")
        self.compute_task_losses_func = compute_task_losses_func
        self.task_data = TaskData(config)
        self.step_losses: StepLosses | None = None
        self.mtl_state: Any = None  # until the tasks are known
        self._given_aggregator = aggregator
        self._evaluation = TaskEvaluation(self)
        self.feedback = Feedback(self)
        self.gradient_step = GradientStep(self)
        has_function, data = compute_task_losses_func is not None, self.task_data
        train_dataset, eval_dataset = map(given.get, ("train_dataset", "eval_dataset"))
        given["train_dataset"] = data.take_datasets(train_dataset, eval_dataset, has_function)
        super().__init__(*bound.args, **bound.kwargs)
        refuse_unsupported(self)
        label_names = self.label_names or ()
        data.take_samples(self.train_dataset, label_names, self._train_batch_size, has_function)
        self.task_counts = TaskCounts(data, label_names, getattr(self, "_loss_shifts_labels", False))
        self.passes = PartPasses(self) if data.splits else LabelPasses(self)
        if data.known is not None:
            self._make_state()

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, in the order of their numbers."""
        return self.task_data.names

    @property
    def aggregator(self) -> Aggregator:
        """The method that combines the gradients."""
        aggregator: Aggregator = self.mtl_state.aggregator
        return aggregator

    @property
    def conflicts(self) -> ConflictRecorder:
        """The gradient conflicts recorded so far."""
        conflicts: ConflictRecorder = self.mtl_state.conflicts
        return conflicts

    def _make_state(self) -> MTLState:
        self.mtl_state = MTLState.new(self.args, self.task_names, self._given_aggregator)
        if self.aggregator.needs_feedback:
            self.add_callback(self.feedback)
        return self.mtl_state

    # ------------------------------------------------------------------ one optimiser step

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """
        Train, as `Trainer` does. Each call keeps its own record of conflicts. The state of the method is treated like
        the optimiser's: a second call goes on with it, unless `model_init` makes a new model.
        """
        self.feedback.drop()
        if self.mtl_state is not None:
            self.mtl_state.restart(forget=self.model_init is not None)
        # A compiled graph otherwise gives its buffers away in the first task's backward pass.
        with torch._functorch.config.patch(donated_buffer=False):
            return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Take the micro-batches of one optimiser step and count the labels of each task in them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            if self.task_data.known is None:
                self.task_data.known = names_of_losses(self, batches[0])
                self._make_state()
            if self.mtl_state is not None and self.mtl_state.gradients is not None:
                self.mtl_state.gradients.clear()
            sharded = any(is_sharded(parameter) for parameter in self.model.parameters())
            count = self._get_num_items_in_batch
            self.step_losses = StepLosses(self.task_counts.window(batches, device, count, sharded))
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """
        Collect the gradients of a micro-batch, task by task. With the step's last micro-batch, combine them, write
        them back into `.grad`, and record them.
        """
        losses = self.step_losses
        assert losses is not None and self.mtl_state is not None
        losses.begun += 1
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        source = inputs.pop(SOURCE, None)
        with getattr(self, "maybe_activation_offload_context", None) or nullcontext():
            self.gradient_step.collect(model, inputs)
        if self.accelerator.sync_gradients:
            combined = self.gradient_step.combine(model, source)
            if combined is not None:
                self.gradient_step.write_back(combined)
        return torch.tensor(losses.next_loss(self.aggregator.reduction), device=self.args.device, dtype=torch.float32)

    # ------------------------------------------------------------------ losses and evaluation

    def compute_task_losses(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None, return_outputs: bool = False
    ) -> Any:
        """
        Compute the loss of each task on a micro-batch whose samples have several labels. Override this method, pass
        `compute_task_losses_func`, or let the model return `task_losses`.

        Args:
            model, inputs:
                As for `compute_loss`.
            num_items_in_batch (`dict[str, torch.Tensor]`, *optional*):
                Number of labels per task in the accumulation window, with `task_loss_scale="window"`.
            return_outputs (`bool`, *optional*, defaults to `False`):
                Whether to return the model's outputs too.

        Returns:
            `dict[str, torch.Tensor]`: A scalar for each task of the batch.
        """
        losses, outputs = losses_and_outputs(self, model, inputs, num_items_in_batch)
        return (losses, outputs) if return_outputs else losses

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of a batch: the mean over its tasks, or the model's own loss if every sample has one task."""
        if not self.task_data.splits:
            return self._evaluation.mean_of_tasks(model, inputs, return_outputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict a batch, as `Trainer` does, and evaluate the loss of each of its tasks."""
        predict = super().prediction_step
        return self._evaluation.step(lambda bare: predict(model, bare, *args, **kwargs), model, inputs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, as `Trainer` does, and add the loss of every task to the metrics."""
        with self._evaluation.running():
            output = super().evaluation_loop(*args, **kwargs)
            prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
            output.metrics.update(self._evaluation.metrics(prefix))
        return output

    # ------------------------------------------------------------------ logs and checkpoints

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the losses of the tasks and the conflicts since the last log too. The last log has a summary."""
        if self.mtl_state is not None and "train_runtime" in logs:
            logs.update(self.mtl_state.summary(self.state.max_steps))
        elif self.mtl_state is not None and "loss" in logs:
            logs.update(self.mtl_state.logs(self.state.max_steps))
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self.mtl_state is not None:
            write_state(output_dir, self.mtl_state.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        saved = read_state(checkpoint, method_of(self.args, self._given_aggregator), self.task_data.known)
        if saved is None:
            logger.warning("%s has no state of multi-task training; the method starts afresh.", checkpoint)
            return
        self.task_data.known = list(saved["tasks"])
        (self.mtl_state or self._make_state()).load_state_dict(saved)


class MTLTrainer(MTLTrainerMixin, Trainer):
    """
    transformers' `Trainer` for several tasks.

    The gradients of the shared trainable parameters are collected task by task. They are accumulated over
    micro-batches, averaged over processes, and combined once per optimiser step, before clipping. Parameters of a
    single task keep their own gradient. For a sparse adapter, the shared parameters are its values.

    It works with gradient accumulation, fp16 and bf16, gradient checkpointing, DistributedDataParallel and FSDP2, and
    resumes bit for bit. A second `train()` goes on with the state of the method if it goes on with the optimiser's, so
    not with `model_init`.

    Losses come from the first of these that is there:

    - `compute_task_losses_func`;
    - the model's loss on the samples of each task, if the training set is a dict of data sets or has the column
      `task_ids`;
    - the model's output `task_losses`.

    If every sample has one task, `data_collator` is called on the samples of each task. A collated batch is never
    split, because its rows need not be samples: images, patches, videos and padding-free rows stay with their samples.
    For data loaders of your own, collate with `trainer.task_collator()`.

    Args:
        *args, **kwargs:
            As for `Trainer`, with an [`MTLConfig`] as `args`. `train_dataset` may be a dict with one data set per
            task.
        compute_task_losses_func (`Callable`, *optional*):
            `f(outputs, labels, num_items_in_batch) -> dict` with a scalar loss per task. `labels` is the tensor of the
            one label name, or a dict if `label_names` has several. Leave out a task that the batch lacks. A loss is
            the mean over labels that are neither -100 nor NaN: the labels of the task, or its column of labels
            `[samples, tasks]`. With `task_column` in `label_names`, `labels` holds the task number of every sample.
        aggregator ([`Aggregator`], *optional*):
            A method of your own, in place of `mtl_method`.

    Raises:
        `ValueError`: With DeepSpeed, `nn.DataParallel`, FSDP 1, optimisers that step during the backward pass, rows
            packed with samples of several tasks, or a batch that was collated with several tasks in it.

    Usage:

        ```python
        from peft_ext.mtl import MTLConfig, MTLTrainer

        trainer = MTLTrainer(
            model=model,
            args=MTLConfig(output_dir="out", mtl_method="pcgrad", label_names=["labels_seg", "labels_depth"]),
            train_dataset=dataset,
            compute_task_losses_func=lambda outputs, labels, num_items_in_batch=None: {
                "seg": F.cross_entropy(outputs["seg"], labels["labels_seg"]),
                "depth": F.l1_loss(outputs["depth"], labels["labels_depth"]),
            },
        )
        trainer.train()
        ```
    """
