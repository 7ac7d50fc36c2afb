"""The part of a checkpoint that multi-task training adds: `mtl_state.pt`."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..io import replace


STATE_NAME = "mtl_state.pt"


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
