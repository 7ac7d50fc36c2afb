"""Changes of a checkpoint by merging an adapter: per tensor, positions and new values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..sparse.another_base import accepts_another_base
from ..sparse.support import Support
from .adapter import AdapterFile
from .checkpoint import Checkpoint
from .names import Names
from .piece import Piece, values_at


# From a tensor to positions in it when flattened, int64 (`None` for all of it), and the new values in its dtype.
Change = Callable[[Tensor], tuple[Tensor | None, Tensor]]


def changes_of(checkpoint: Checkpoint, adapter: AdapterFile) -> dict[str, list[Change]]:
    """
    The changes that merging makes, by the names of the checkpoint's tensors. Nothing large is read before a change is
    called. Raises `ValueError` if the adapter is not a sparse one, or trains what the checkpoint does not have.
    """
    adapter.require_sparse("merging files")
    names = Names(checkpoint)
    changes: defaultdict[str, list[Change]] = defaultdict(list)
    if not adapter.modules:
        raise ValueError(f"{adapter.path} has no entries, so there is nothing to merge.")
    for module in adapter.modules:
        entries = adapter.entries(module)
        ways = names.ways(module, entries.support.rows, entries.support.fan_in)
        if len(ways[0]) == 1:
            changes[ways[0][0].key].append(partial(_of_entries, adapter, module, ways))
        else:  # the base model's are known by all its tensors together
            for piece in _fitting(adapter, module, ways, checkpoint.read):
                changes[piece.key].append(partial(_of_piece, adapter, module, piece))
        if entries.bias is not None:
            key, first = names.bias(module, entries.support.rows)
            changes[key].append(partial(_of_bias, adapter, module, first))
    for name, file_key in adapter.whole():
        changes[_known(names, checkpoint, name, adapter)].append(partial(_of_whole, adapter, file_key))
    for module, file_key, tokens in adapter.tokens():
        key = _known(names, checkpoint, f"{module}.weight", adapter)
        changes[key].append(partial(_of_tokens, adapter, file_key, tokens))
    return dict(changes)


def _known(names: Names, checkpoint: Checkpoint, name: str, adapter: AdapterFile) -> str:
    key = names.key(name)
    if key is None:
        raise ValueError(
            f"{adapter.path} brings '{name}', which {checkpoint.folder} does not have, such as a new head. Load the "
            "adapter in Python, and save what merge_and_unload() returns."
        )
    return key


def _of_entries(adapter: AdapterFile, module: str, ways: list[list[Piece]], tensor: Tensor) -> tuple[Tensor, Tensor]:
    (piece,) = _fitting(adapter, module, ways, lambda key: tensor)
    return _of_piece(adapter, module, piece, tensor)


def _of_piece(adapter: AdapterFile, module: str, piece: Piece, tensor: Tensor) -> tuple[Tensor, Tensor]:
    entries = adapter.entries(module)
    inside, positions = piece.within(entries.support)
    added = entries.values.reshape(-1)[inside]
    return positions, (tensor.view(-1)[positions] + added).to(tensor.dtype)


def _fitting(adapter: AdapterFile, module: str, ways: list[list[Piece]], read: Callable[[str], Tensor]) -> list[Piece]:
    """The way to hold a weight in which it has the values that the adapter's entries were chosen for."""
    entries = adapter.entries(module)
    values = [values_at(pieces, entries.support, read)[None] for pieces in ways]
    # As one neuron that has them all: fingerprints depend on the values' order, not on where they lie.
    count, fingerprint = entries.support.entries, entries.fingerprint.clone()
    alone = Support(torch.arange(count, dtype=torch.int32)[None], count)
    fingerprint[:2] = torch.tensor([1, count])
    reasons = [alone.mismatch(fingerprint, found) for found in values]
    fitting = [number for number, reason in enumerate(reasons) if reason is None]
    name = ways[0][0].key if len(ways[0]) == 1 else module
    if not fitting:
        raise ValueError(
            f"{adapter.path} was made for another base model: '{name}' has {reasons[0]}. Pass the base model it was "
            "trained on or, to merge into this one on purpose, --another-base."
        )
    if accepts_another_base() and len(fitting) > 1:
        distances = [alone.distance(fingerprint, values[number]) for number in fitting]
        if distances[0] != distances[1]:
            return ways[fitting[distances.index(min(distances))]]
    if len(fitting) > 1:
        raise ValueError(
            f"{adapter.path} does not say which weight '{module}' was made for, and '{name}' is square, so rows and "
            "columns can't be told apart. Load the adapter in Python, and save what merge_and_unload() gives."
        )
    return ways[fitting[0]]


def _of_bias(adapter: AdapterFile, module: str, first: int, tensor: Tensor) -> tuple[Tensor, Tensor]:
    added = adapter.entries(module).bias
    assert added is not None
    positions = torch.arange(first, first + added.numel())
    return positions, (tensor[positions] + added).to(tensor.dtype)


def _of_whole(adapter: AdapterFile, file_key: str, tensor: Tensor) -> tuple[None, Tensor]:
    new = adapter.tensor(file_key)
    if new.shape != tensor.shape:
        raise ValueError(
            f"{adapter.path}: '{file_key}' has the shape {tuple(new.shape)}, the base {tuple(tensor.shape)}."
        )
    return None, new.to(tensor.dtype)


def _of_tokens(adapter: AdapterFile, file_key: str, tokens: list[int], tensor: Tensor) -> tuple[Tensor, Tensor]:
    new, width = adapter.tensor(file_key), tensor.shape[1]
    if new.shape != (len(tokens), width) or max(tokens) >= len(tensor):
        raise ValueError(f"{adapter.path}: '{file_key}' does not fit an embedding {tuple(tensor.shape)}.")
    positions = torch.tensor(tokens)[:, None] * width + torch.arange(width)
    return positions.reshape(-1), new.to(tensor.dtype).reshape(-1)
