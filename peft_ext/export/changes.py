"""Changes of a checkpoint by merging an adapter: per tensor, positions and new values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..sparse.another_base import accepts_another_base
from .adapter import AdapterFile
from .checkpoint import Checkpoint
from .experts import Piece, mismatch
from .names import Names, Place


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
        ways = names.pieces(module, entries.support.rows, entries.support.fan_in)
        if ways:
            for piece in _fitting_way(checkpoint, adapter, module, ways):
                changes[piece.key].append(partial(_of_piece, adapter, module, piece))
            if entries.bias is not None:
                raise ValueError(f"{adapter.path} trains biases of the experts '{module}': merge it in Python.")
            continue
        places = names.places(module, entries.support.rows, entries.support.fan_in)
        changes[places[0].key].append(partial(_of_entries, adapter, module, places))
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


def _of_entries(adapter: AdapterFile, module: str, places: list[Place], tensor: Tensor) -> tuple[Tensor, Tensor]:
    entries = adapter.entries(module)
    place = _fitting(adapter, module, tensor, places)
    _check_float(place.key, tensor)
    positions = place.positions(entries.support)
    return positions, (tensor.view(-1)[positions] + entries.values.reshape(-1)).to(tensor.dtype)


def _fitting_way(checkpoint: Checkpoint, adapter: AdapterFile, module: str, ways: list[list[Piece]]) -> list[Piece]:
    """The tensors that have the values that the adapter's entries were chosen for."""
    reasons = [mismatch(checkpoint, way, adapter.entries(module)) for way in ways]
    if None not in reasons:
        raise ValueError(
            f"{adapter.path} was made for another base model: '{module}' has {reasons[0]}. Pass the base model it was "
            "trained on or, to merge into this one on purpose, --another-base."
        )
    if reasons.count(None) > 1:
        raise ValueError(
            f"{adapter.path}: the weights of '{module}' are square, so rows and columns can't be told apart without "
            "the base model it was made for. Load the adapter in Python, and save what merge_and_unload() gives."
        )
    return ways[reasons.index(None)]


def _of_piece(adapter: AdapterFile, module: str, piece: Piece, tensor: Tensor) -> tuple[Tensor, Tensor]:
    entries = adapter.entries(module)
    _check_float(piece.key, tensor)
    inside, positions = piece.within(entries.support)
    added = entries.values.reshape(-1)[inside]
    return positions, (tensor.view(-1)[positions] + added).to(tensor.dtype)


def _check_float(key: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        raise ValueError(f"'{key}' is stored as {tensor.dtype}, too coarse to hold an update.")


def _fitting(adapter: AdapterFile, module: str, tensor: Tensor, places: list[Place]) -> Place:
    """The place where the adapter's entries have the values that they were chosen for."""
    entries = adapter.entries(module)
    reasons = {place: entries.support.mismatch(entries.fingerprint, place.matrix(tensor)) for place in places}
    fitting = [place for place, reason in reasons.items() if reason is None]
    if not fitting:
        raise ValueError(
            f"{adapter.path} was made for another base model: '{places[0].key}' has {reasons[places[0]]}. Pass the "
            "base model it was trained on or, to merge into this one on purpose, --another-base."
        )
    if accepts_another_base() and len(fitting) > 1:
        distances = [entries.support.distance(entries.fingerprint, place.matrix(tensor)) for place in fitting]
        if distances[0] != distances[1]:
            return fitting[distances.index(min(distances))]
    if len(fitting) > 1:
        raise ValueError(
            f"{adapter.path} does not say which weight '{module}' was made for, and '{places[0].key}' is square, so "
            "rows and columns can't be told apart. Load the adapter in Python, and save what merge_and_unload() gives."
        )
    return fitting[0]


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
