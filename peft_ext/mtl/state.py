"""The state of multi-task training, and its file in a checkpoint: `mtl_state.pt`."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..io import replace
from .aggregators import Aggregator, make_aggregator
from .aggregators.base import Array
from .conflicts.recorder import ConflictRecorder, mean_of_known
from .gradients.task_gradients import TaskGradients


STATE_NAME = "mtl_state.pt"


@dataclass
class MTLState:
    """What multi-task training carries from one optimiser step to the next."""

    method: str  # name of the method
    tasks: list[str]  # names of the tasks
    aggregator: Aggregator  # the method
    conflicts: ConflictRecorder  # the gradient conflicts recorded so far
    gradients: TaskGradients | None = None  # the tasks' gradients; from the first step on
    # The tasks' losses `[tasks]` of every step since the last log
    logged_losses: list[Array] = field(default_factory=list)
    skipped_steps: int = 0  # steps left out because their gradients were not finite

    def __post_init__(self) -> None:
        self.untrained = copy.deepcopy(self.aggregator.state_dict())
        self.loaded_gradients: dict[str, Any] | None = None  # until there are parameters

    @classmethod
    def new(cls, config: Any, tasks: list[str], aggregator: Aggregator | None = None) -> MTLState:
        """That of an untrained method: the one that `config` ([`MTLArguments`]) asks for, or `aggregator`."""
        options = {"reduction": config.gradient_reduction, "seed": config.seed, **(config.mtl_method_kwargs or {})}
        path = os.path.join(config.output_dir, config.conflict_file) if config.conflict_file else None
        recorder = ConflictRecorder(tasks, path if config.should_save else None)
        method = method_of(config, aggregator)
        return cls(method, tasks, aggregator or make_aggregator(method, len(tasks), **options), recorder)

    def restart(self, forget: bool) -> None:
        """Begin a training: with new records, of parameters that may be others, and `forget` the method's state."""
        if self.conflicts.steps:
            self.conflicts = ConflictRecorder(self.tasks, self.conflicts.path)
        self.gradients, self.logged_losses, self.skipped_steps = None, [], 0
        if forget:
            self.aggregator.load_state_dict(copy.deepcopy(self.untrained))

    def attach(self, gradients: TaskGradients) -> TaskGradients:
        """Take the object that collects the gradients, and give it what a checkpoint knows of the parameters."""
        if self.loaded_gradients is not None:
            gradients.load_state_dict(self.loaded_gradients)
        self.gradients, self.loaded_gradients = gradients, None
        return gradients

    def logs(self, total_steps: int) -> dict[str, float]:
        """The tasks' mean losses and the conflicts since the last call."""
        block = np.array(self.logged_losses).reshape(-1, len(self.tasks))  # [steps, tasks]
        means = {f"task_loss/{name}": mean_of_known(losses) for name, losses in zip(self.tasks, block.T, strict=True)}
        self.logged_losses = []
        return {
            **{name: mean for name, mean in means.items() if not np.isnan(mean)},
            **self.conflicts.logs(total_steps),
        }

    def summary(self, total_steps: int) -> dict[str, float]:
        """The conflicts of the whole training, and the number of skipped steps."""
        skipped = {"skipped_steps": float(self.skipped_steps)} if self.skipped_steps else {}
        return {**self.conflicts.summary(total_steps), **skipped}

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps and logs depend on, as tensors and plain values."""
        return {
            "method": self.method,
            "tasks": self.tasks,
            "aggregator": self.aggregator.state_dict(),
            "conflicts": self.conflicts.state_dict(),
            "gradients": self.gradients.state_dict() if self.gradients is not None else None,
            "logged_losses": [losses.tolist() for losses in self.logged_losses],
            "skipped_steps": self.skipped_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, bit for bit."""
        self.aggregator.load_state_dict(state["aggregator"])
        self.conflicts.load_state_dict(state["conflicts"])
        self.loaded_gradients = state["gradients"]
        self.logged_losses = [np.array(losses) for losses in state["logged_losses"]]
        self.skipped_steps = state["skipped_steps"]


def method_of(config: Any, aggregator: Aggregator | None) -> str:
    """The name of a method, as checkpoints have it."""
    name: str = config.mtl_method if aggregator is None else type(aggregator).__name__
    return name


def write_state(folder: str, state: dict[str, Any]) -> None:
    """Write a state of tensors and plain values; an interruption leaves the old file whole."""
    os.makedirs(folder, exist_ok=True)
    replace(os.path.join(folder, STATE_NAME), lambda temporary: torch.save(state, temporary))


def read_state(folder: str, method: str, tasks: list[str] | None) -> dict[str, Any] | None:
    """
    Read what `write_state` wrote; `None` if the folder does not have it.

    Raises:
        `ValueError`: if it was written by another method or for other tasks, or is not whole.
    """
    path = os.path.join(folder, STATE_NAME)
    if not os.path.isfile(path):
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a whole state file ({error}); resume from another checkpoint.") from error
    if state["method"] != method:
        raise ValueError(f"{path} was written with {state['method']}, not {method}; resume with the same mtl_method.")
    if tasks is not None and state["tasks"] != tasks:
        raise ValueError(f"{path} was written for the tasks {state['tasks']}, not {tasks}.")
    return state
