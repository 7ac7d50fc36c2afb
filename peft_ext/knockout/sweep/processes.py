"""Rank and world size of the current process."""

from __future__ import annotations

import torch
from accelerate import PartialState


def this_process() -> PartialState:
    """
    Accelerate's state, begun if nobody has. On a machine without accelerators it has to be told so: it would take the
    processes of a launcher for one each, all with the same share of the work.
    """
    found = getattr(torch, "accelerator", None)  # torch >= 2.6
    has_accelerator = torch.cuda.is_available() or bool(found and found.is_available())
    return PartialState(cpu=not has_accelerator)
