"""Merge an adapter into a checkpoint's files, shard by shard, and take it out again."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .adapter import AdapterFile
from .changes import Change, changes_of
from .checkpoint import Checkpoint
from .folder import filled_at_once
from .patch import SparsePatch, read_patch, write_patch


# No ending that serving engines take for weights: vLLM reads every `*.safetensors` beside a model.
ORIGINALS_FILE = "peft_ext_merge.originals"
Name = str | os.PathLike[str]


@torch.no_grad()
def merge_checkpoint(base: Name, adapter: Name, out: Name) -> int:
    """
    Merge a sparse adapter into a checkpoint without loading the model: one tensor is in memory at a time. The tensors
    are bit for bit those of `merge_and_unload()` on the model loaded in the checkpoint's dtype.

    The numbers that were replaced are kept in `peft_ext_merge.originals` beside the weights, for
    [`revert_checkpoint`].

    Args:
        base (`str`):
            Folder or Hub id of the base model, in safetensors.
        adapter (`str`):
            Folder or Hub id of the adapter, or the file of a patch (see [`export_patch`]).
        out (`str`):
            Folder to write to, new or empty.

    Returns:
        `int`: Number of values that were replaced.

    Raises:
        `ValueError`: If the base is not the adapter's (see [`another_base`]), is quantised, or is no safetensors
            checkpoint. If the adapter is not a sparse one, or trains what the checkpoint does not have. If `out` has
            files in it. Nothing is left in `out` then.

    Example:

        ```py
        >>> from peft_ext.export import merge_checkpoint

        >>> merge_checkpoint("meta-llama/Llama-3.2-1B", "my-adapter", "merged")
        ```
    """
    checkpoint = Checkpoint(base)
    with filled_at_once(Path(out), last="config.json") as folder:
        if Path(adapter).is_file():
            patches, _ = read_patch(adapter)
            _check_names(checkpoint, adapter, patches)
            originals, identity = _copy_patched(checkpoint, folder, patches), _identity(patches)
        else:
            with AdapterFile(adapter) as opened:
                edits = {key: partial(_merge, key, made) for key, made in changes_of(checkpoint, opened).items()}
                originals, identity = checkpoint.copy_changed(folder, edits), opened.checksum or "unknown"
        write_patch(folder / ORIGINALS_FILE, originals.values(), adapter=identity)
    return _size(originals)


@torch.no_grad()
def revert_checkpoint(merged: Name, adapter: Name, out: Name) -> int:
    """
    Undo [`merge_checkpoint`] and restore every bit of the base model's weights.

    Args:
        merged (`str`):
            Folder that `merge_checkpoint` wrote.
        adapter (`str`):
            The adapter, or patch, that was merged.
        out (`str`):
            Folder to write to, new or empty.

    Returns:
        `int`: Number of values that were put back.

    Raises:
        `ValueError`: If the folder has no originals, they are another adapter's, or the weights were changed since.
    """
    checkpoint = Checkpoint(merged)
    path = checkpoint.folder / ORIGINALS_FILE
    if not path.is_file():
        raise ValueError(
            f"{checkpoint.folder} has no {ORIGINALS_FILE}, which `peft-ext merge` writes beside the weights; without "
            "it the originals are known to the base model alone."
        )
    patches, facts = read_patch(path)
    if Path(adapter).is_file():
        checksum: str | None = _identity(read_patch(adapter)[0])
    else:
        with AdapterFile(adapter) as opened:
            checksum = opened.checksum
    if facts.get("adapter") != (checksum or "unknown"):
        raise ValueError(f"{path} holds what another adapter than {adapter!s} has replaced.")
    _check_names(checkpoint, path, patches)
    with filled_at_once(Path(out), last="config.json") as folder:
        _copy_patched(checkpoint, folder, patches)
    return _size(patches)


@torch.no_grad()
def export_patch(adapter: Name, base: Name, out: Name) -> int:
    """
    Write the weights that merging changes as a sparse patch of the checkpoint. [`peft_ext.export.patch`] explains the
    layout of the file.

    Args:
        adapter (`str`):
            Folder or Hub id of the adapter.
        base (`str`):
            Folder or Hub id of the base model, in the dtype in which the patch will be applied.
        out (`str`):
            Folder to write `patch.safetensors` to, new or empty.

    Returns:
        `int`: Number of values that the patch replaces.

    Raises:
        `ValueError`: As for [`merge_checkpoint`].
    """
    checkpoint = Checkpoint(base)
    with AdapterFile(adapter) as opened, filled_at_once(Path(out), last="patch.safetensors") as folder:
        patches = {
            key: _combined(key, changes, checkpoint.read(key))
            for key, changes in changes_of(checkpoint, opened).items()
        }
        write_patch(folder / "patch.safetensors", patches.values(), adapter=opened.checksum or "unknown")
    return _size(patches)


def _combined(key: str, changes: list[Change], tensor: Tensor) -> SparsePatch:
    """The changes of one tensor, in which several modules may lie, apart from each other."""
    parts = [change(tensor) for change in changes]
    positions = [where for where, _ in parts if where is not None]
    if len(positions) == len(parts):
        return SparsePatch.between(key, tensor, torch.cat(positions), torch.cat([new.reshape(-1) for _, new in parts]))
    if len(parts) > 1:
        raise ValueError(f"The adapter replaces '{key}' whole and changes entries of it, so it is damaged.")
    return SparsePatch.between(key, tensor, *parts[0])


def _merge(key: str, changes: list[Change], tensor: Tensor) -> SparsePatch:
    """Change a tensor in place; returns the patch that undoes it."""
    return _combined(key, changes, tensor).apply(tensor)


def _copy_patched(checkpoint: Checkpoint, folder: Path, patches: dict[str, SparsePatch]) -> dict[str, SparsePatch]:
    """Write a checkpoint with patches applied; returns those that undo them."""
    return checkpoint.copy_changed(folder, {key: patch.apply for key, patch in patches.items()})


def _identity(patches: dict[str, SparsePatch]) -> str:
    return " ".join(f"{patch.replaces & 0xFFFFFFFF:08x}" for patch in patches.values())


def _check_names(checkpoint: Checkpoint, path: Name, patches: dict[str, SparsePatch]) -> None:
    lacking = sorted(patches.keys() - checkpoint.tensors.keys())
    if lacking:
        raise ValueError(f"{path!s} changes '{lacking[0]}', which {checkpoint.folder} does not have.")


def _size(patches: dict[str, SparsePatch]) -> int:
    return sum(patch.values.numel() for patch in patches.values())
