"""Hooks are on the model, and so on every call to it. These serve the calls of one thread."""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch


def own_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """
    A hook that leaves other threads' calls alone: knocked out is what the thread runs that registers it.

    A backward pass is not told apart: on a GPU autograd recomputes checkpointed layers in threads of its own.
    """
    owner = get_ident()

    def only_here(*arguments: Any) -> Any:
        if get_ident() == owner or torch._C._current_graph_task_id() != -1:
            return hook(*arguments)
        return None  # to torch: nothing is changed

    return only_here
