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
    The options themselves, to be mixed into an arguments class: [`MTLConfig`] for `Trainer`, `MTLSFTConfig` for TRL's
    `SFTTrainer`.

    Args:
        mtl_method (`str`, *optional*, defaults to `"joint"`):
            How the tasks' gradients are combined: `"joint"`, `"pcgrad"`, `"cagrad"`, `"graddrop"`, `"mgda"`,
            `"imtl_g"`, `"nash_mtl"`, `"famo"`, or one of TorchJD's (`peft_ext.mtl.METHODS`).
        mtl_method_kwargs (`dict` or `str`, *optional*):
            The method's options, as a dict or JSON: `{"c": 0.4}` for CAGrad, `{"max_norm": 1.0}` for Nash-MTL.
        task_names (`list[str]`, *optional*):
            Names of the tasks, in the order of their numbers. By default the keys of the dict of training sets, or of
            the first dict of losses.
        task_column (`str`, *optional*, defaults to `"task_ids"`):
            Column with the number of each sample's task.
        task_sampling (`str`, *optional*, defaults to `"mixed"`):
            How samples are drawn where every sample belongs to one task. Samples mixed within a batch: `"mixed"`
            (equal shares, so that every step has every task), `"proportional"` (to the tasks' sizes) or
            `"temperature"`. One task per micro-batch: `"homogeneous"` (every round of micro-batches has each task
            once, in random order) or `"round_robin"` (in fixed order).
        sampling_temperature (`float`, *optional*, defaults to 1.0):
            For `"temperature"`: tasks are drawn with probability proportional to `size ** (1 / temperature)`.
        shared_parameters (`str`, *optional*):
            Regular expression searched for in the names of trainable parameters: those whose gradients are combined.
            By default those that more than one task reaches; for a PEFT model, the adapter without `modules_to_save`.
        gradient_reduction (`str`, *optional*, defaults to `"mean"`):
            Scale of the combined gradient: `"mean"` (thesis, equations 6.5 and 6.6) or `"reference"` (published code).
        jacobian_dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype in which each task's gradient is kept. Inner products are computed in float64.
        task_loss_scale (`str`, *optional*, defaults to `"batch"`):
            What `compute_task_losses_func` returns: `"batch"`, means over the micro-batch, which are weighted by its
            share of the task's labels in the accumulation window; or `"window"`, sums already divided by the
            `num_items_in_batch[task]` that it then receives.
        conflict_logging_steps (`int`, *optional*, defaults to 1):
            Record gradient conflicts every so many optimiser steps; 0 never. Free with every method but `"joint"` on
            one input with several labels, which then pays one backward pass per task in those steps.
        conflict_granularity (`str`, *optional*, defaults to `"model"`):
            `"layer"` also records the incidence per layer.
        conflict_file (`str`, *optional*, defaults to `"gradient_conflicts.jsonl"`):
            File in `output_dir` with one line per recorded step; empty for none.
        noise_floor_steps (`int`, *optional*, defaults to 0):
            Every so many steps, compare the gradients of two halves of one task's batch, which shows how many
            conflicts noise alone makes. Costs two more passes over the batch, whose samples are collated anew. These
            steps' conflicts are recorded too. Not with FSDP2.
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
    `TrainingArguments` with the options of multi-task training; see [`MTLArguments`].

    Example:

    ```py
    >>> from peft_ext.mtl import MTLConfig

    >>> config = MTLConfig(output_dir="out", mtl_method="cagrad", mtl_method_kwargs={"c": 0.4})
    ```
    """
