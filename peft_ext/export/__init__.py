"""Adapters out of PEFT: merged into a checkpoint's files, as a LoRA, as a sparse patch; and what is in their files."""

import importlib
from typing import Any


_HOMES = {
    "export_lora": "lora",
    "export_patch": "merging",
    "merge_checkpoint": "merging",
    "revert_checkpoint": "merging",
    "apply_patch": "patch",
    "read_patch": "patch",
    "inspect_adapters": "inspecting",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # the commands' options are read without torch
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
