"""Options of multi-task training, on top of those of transformers' Trainer."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .aggregators import METHODS, REDUCTIONS
from .data.datasets import SAMPLINGS


JACOBIAN_DTYPES = ("float32", "bfloat16", "float64")
LOSS_SCALES = ("batch", "window")
GRANULARITIES = ("model", "layer")


@dataclass
class MTLArguments:
    """
    The options of multi-task training, to be mixed into a class of training arguments. [`MTLConfig`] explains them. It
    mixes them into `TrainingArguments`, and [`MTLSFTConfig`] into TRL's `SFTConfig`.
    """

    mtl_method: str = field(default="joint", metadata={"help": "How the tasks' gradients are combined."})
    mtl_method_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the method, as JSON on the command line."}
    )
    task_names: list[str] | None = field(default=None, metadata={"help": "Names of the tasks, in order."})
    task_column: str = field(default="task_ids", metadata={"help": "Column with each sample's task number."})
    task_sampling: str = field(
        default="mixed", metadata={"help": "mixed, proportional, temperature, homogeneous or round_robin."}
    )
    sampling_temperature: float = field(default=1.0, metadata={"help": "For task_sampling='temperature'."})
    shared_parameters: str | None = field(
        default=None, metadata={"help": "Regular expression of the parameters whose gradients are combined."}
    )
    gradient_reduction: str = field(default="mean", metadata={"help": "mean, or reference: published code's scale."})
    jacobian_dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float64."})
    task_loss_scale: str = field(default="batch", metadata={"help": "batch (means) or window (divided by counts)."})
    conflict_logging_steps: int = field(default=1, metadata={"help": "Record conflicts every so many steps; 0 never."})
    conflict_granularity: str = field(default="model", metadata={"help": "model or layer."})
    conflict_file: str = field(
        default="gradient_conflicts.jsonl", metadata={"help": "File in output_dir, one line per recorded step."}
    )
    noise_floor_steps: int = field(default=0, metadata={"help": "Measure the noise floor every so many steps."})

    def __post_init__(self) -> None:
        self._check_mtl()
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()

    def _check_mtl(self) -> None:
        if isinstance(self.mtl_method_kwargs, str):
            try:
                self.mtl_method_kwargs = json.loads(self.mtl_method_kwargs)
            except ValueError as error:
                raise ValueError(f"mtl_method_kwargs={self.mtl_method_kwargs!r} is not JSON: {error}") from error
        if self.mtl_method_kwargs is not None and not isinstance(self.mtl_method_kwargs, dict):
            raise ValueError(f"mtl_method_kwargs={self.mtl_method_kwargs!r} must be a dict of options.")
        for name, choices in (
            ("mtl_method", METHODS),
            ("task_sampling", SAMPLINGS),
            ("gradient_reduction", REDUCTIONS),
            ("jacobian_dtype", JACOBIAN_DTYPES),
            ("task_loss_scale", LOSS_SCALES),
            ("conflict_granularity", GRANULARITIES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(choices)}.")
        for name in ("conflict_logging_steps", "noise_floor_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 0.")
        if not self.sampling_temperature > 0:
            raise ValueError(f"sampling_temperature={self.sampling_temperature!r} must be above 0.")
        if self.task_names is not None and len(set(self.task_names)) != len(self.task_names):
            raise ValueError(f"task_names={self.task_names!r} names a task twice.")
        if self.shared_parameters is not None:
            try:
                re.compile(self.shared_parameters)
            except re.error as error:
                raise ValueError(
                    f"shared_parameters={self.shared_parameters!r} is not a regular expression: {error}"
                ) from error


@dataclass
class MTLConfig(MTLArguments, TrainingArguments):
    """
    Arguments of [`MTLTrainer`]: transformers' `TrainingArguments`, and the following ones.

    Args:
        mtl_method (`str`, *optional*, defaults to `"joint"`):
            How the gradients of the tasks are combined: `"joint"`, `"pcgrad"`, `"cagrad"`, `"graddrop"`, `"mgda"`,
            `"imtl_g"`, `"nash_mtl"`, `"famo"`, or one of TorchJD's methods. `peft_ext.mtl.METHODS` lists them all.
        mtl_method_kwargs (`dict` or `str`, *optional*):
            Options of the method, as a dict or as JSON: `{"c": 0.4}` for CAGrad, `{"max_norm": 1.0}` for Nash-MTL.
        task_names (`list[str]`, *optional*):
            Names of the tasks, in the order of their numbers. By default the keys of the dict of training sets, or of
            the first dict of losses.
        task_column (`str`, *optional*, defaults to `"task_ids"`):
            Name of the column that holds the number of each sample's task.
        task_sampling (`str`, *optional*, defaults to `"mixed"`):
            How samples are drawn if every sample belongs to one task. Three choices mix tasks within a batch:
            `"mixed"` (equal shares, so that every step has every task), `"proportional"` (to the sizes of the tasks)
            and `"temperature"`. Two choices give each micro-batch one task: `"homogeneous"` (each round of
            micro-batches has each task once, in random order) and `"round_robin"` (in fixed order).
        sampling_temperature (`float`, *optional*, defaults to 1.0):
            With `task_sampling="temperature"`, tasks are drawn with probability proportional to
            `size ** (1 / temperature)`.
        shared_parameters (`str`, *optional*):
            Regular expression for names of trainable parameters. The gradients of those that match are combined. By
            default these are the parameters that more than one task reaches, and for a PEFT model the adapter without
            `modules_to_save`.
        gradient_reduction (`str`, *optional*, defaults to `"mean"`):
            Scale of the combined gradient: `"mean"`, the scale of the mean gradient of the tasks, or `"reference"`,
            the scale of the method's published code.
        jacobian_dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype in which the gradient of each task is kept. Inner products are computed in float64.
        task_loss_scale (`str`, *optional*, defaults to `"batch"`):
            What `compute_task_losses_func` returns. `"batch"`: means over the micro-batch. Each is weighted by its
            share of the task's labels in the accumulation window. `"window"`: sums that the function has divided by
            the `num_items_in_batch[task]` that it receives.
        conflict_logging_steps (`int`, *optional*, defaults to 1):
            Record gradient conflicts every so many optimiser steps; 0 never does. Recording is free, except for
            `"joint"` on inputs with several labels: there it costs one backward pass per task in those steps.
        conflict_granularity (`str`, *optional*, defaults to `"model"`):
            `"layer"` also records the conflicts of each layer.
        conflict_file (`str`, *optional*, defaults to `"gradient_conflicts.jsonl"`):
            Name of the file in `output_dir`, with one line per recorded step. An empty name writes none.
        noise_floor_steps (`int`, *optional*, defaults to 0):
            Every so many steps, compare the gradients of two halves of one task's batch; 0 never does. The result
            shows how many conflicts come from noise alone. It costs two more passes over the batch, whose samples are
            collated again. The conflicts of these steps are recorded too. Not available with FSDP2.

    Example:

        ```py
        >>> from peft_ext.mtl import MTLConfig

        >>> config = MTLConfig(output_dir="out", mtl_method="cagrad", mtl_method_kwargs={"c": 0.4})
        ```
    """
