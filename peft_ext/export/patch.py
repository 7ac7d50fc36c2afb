"""
Sparse patches of a checkpoint: for each tensor that changes, positions and new values.

A patch is a safetensors file. `<name>.indices` holds positions in the flattened tensor of that name, one-dimensional,
contiguous and increasing, int32 (int64 where a tensor has 2³¹ numbers or more). `<name>.values` holds the numbers to
put there, in the checkpoint's dtype. A tensor that is replaced as a whole has `<name>.values` in its full shape and no
indices. The file's metadata names the layout, the tensors' shapes, and a checksum of the numbers to be replaced. These
are the coordinates of vLLM's sparse weight updates (`SparseWeightPatch(name, indices, values)`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..sparse.fingerprint import checksum


LAYOUT = "peft_ext sparse patch 1"


@dataclass(frozen=True)
class SparsePatch:
    """
    What changes in one tensor.

    Attributes:
        name (`str`): the tensor's name in the checkpoint.
        shape (`tuple[int, ...]`): its shape.
        indices (`torch.Tensor`, *optional*): `[entries]`, positions in the flattened tensor, increasing, int32 or
            int64; `None` if the whole tensor is replaced.
        values (`torch.Tensor`): `[entries]`, or the whole tensor.
        replaces (`int`): checksum of the numbers that the values take the place of.
    """

    name: str
    shape: tuple[int, ...]
    indices: Tensor | None
    values: Tensor
    replaces: int

    @classmethod
    def between(cls, name: str, tensor: Tensor, positions: Tensor | None, values: Tensor) -> SparsePatch:
        """The patch that writes values at positions, which may have any order, into a tensor."""
        shape = tuple(tensor.shape)
        if positions is None:
            return cls(name, shape, None, values.contiguous(), checksum(tensor))
        positions, order = positions.sort()
        kind = torch.int32 if tensor.numel() < 2**31 else torch.int64
        before = tensor.reshape(-1)[positions]
        return cls(name, shape, positions.to(kind), values.reshape(-1)[order].contiguous(), checksum(before))

    def apply(self, tensor: Tensor) -> SparsePatch:
        """
        Write the values into a tensor, in place.

        Returns:
            [`SparsePatch`]: the patch that undoes it, bit for bit.

        Raises:
            `ValueError`: if the tensor has another shape or dtype, is not contiguous, or holds other numbers than
                those that the patch replaces.
        """
        if tuple(tensor.shape) != self.shape or tensor.dtype != self.values.dtype:
            raise ValueError(
                f"'{self.name}' is {tuple(tensor.shape)} {tensor.dtype}, but the patch is for {self.shape} "
                f"{self.values.dtype}."
            )
        if not tensor.is_contiguous():
            raise ValueError(f"'{self.name}' is not contiguous, so positions in it have no meaning; make it so first.")
        flat = tensor.view(-1)
        indices = None if self.indices is None else self.indices.long().to(tensor.device)
        before = flat.clone() if indices is None else flat[indices]
        if checksum(before) != self.replaces:
            raise ValueError(
                f"'{self.name}' does not hold the numbers that the patch replaces: it was made for another model, or "
                "is applied already."
            )
        values = self.values.reshape(-1).to(tensor.device)
        if indices is None:
            flat.copy_(values)
        else:
            flat[indices] = values
        before = before.cpu() if indices is not None else before.cpu().view(self.shape)
        return SparsePatch(self.name, self.shape, self.indices, before, checksum(values))


def write_patch(path: str | os.PathLike[str], patches: Iterable[SparsePatch], **notes: str) -> None:
    """Write a patch file; `notes` are further metadata."""
    tensors: dict[str, Tensor] = {}
    shapes, replaces = {}, {}
    for patch in patches:
        shapes[patch.name], replaces[patch.name] = patch.shape, patch.replaces
        tensors[f"{patch.name}.values"] = patch.values
        if patch.indices is not None:
            tensors[f"{patch.name}.indices"] = patch.indices
    facts = {"layout": LAYOUT, "shapes": json.dumps(shapes), "replaces": json.dumps(replaces)}
    save_file(tensors, path, metadata={"format": "pt", **facts, **notes})


def read_patch(path: str | os.PathLike[str]) -> tuple[dict[str, SparsePatch], Mapping[str, str]]:
    """
    Read a file that [`export_patch`] wrote.

    Args:
        path (`str`):
            The file.

    Returns:
        `tuple[dict[str, SparsePatch], dict[str, str]]`: The patches by the names of their tensors, and the metadata of
        the file.

    Raises:
        `ValueError`: If the file is no patch.
    """
    try:
        with safe_open(Path(path), framework="pt") as file:
            facts: dict[str, str] = file.metadata() or {}
            if facts.get("layout") != LAYOUT:
                raise ValueError(f"{path!s} is no patch: its metadata lack layout={LAYOUT!r}.")
            shapes, replaces = json.loads(facts["shapes"]), json.loads(facts["replaces"])
            keys = set(file.keys())
            patches = {}
            for name, shape in shapes.items():
                indices = file.get_tensor(f"{name}.indices") if f"{name}.indices" in keys else None
                patch = SparsePatch(name, tuple(shape), indices, file.get_tensor(f"{name}.values"), replaces[name])
                _check(path, patch)
                patches[name] = patch
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{path!s} is not a whole patch file ({error}). Write it again.") from error
    return patches, facts


def _check(path: str | os.PathLike[str], patch: SparsePatch) -> None:
    size, indices = torch.Size(patch.shape).numel(), patch.indices
    fits = patch.values.shape == (patch.shape if indices is None else indices.shape)
    if indices is not None and indices.numel():
        fits &= int(indices[0]) >= 0 and int(indices[-1]) < size and bool((indices[1:] > indices[:-1]).all())
    if not fits:
        raise ValueError(f"{path!s}: the indices of '{patch.name}' do not fit its values or its shape {patch.shape}.")


def apply_patch(tensors: Mapping[str, Tensor], patches: Mapping[str, SparsePatch]) -> dict[str, SparsePatch]:
    """
    Write a patch into tensors in place, such as a model's `state_dict()`.

    Args:
        tensors (`dict[str, torch.Tensor]`):
            Tensors by their names in the checkpoint.
        patches (`dict[str, SparsePatch]`):
            Patches, as [`read_patch`] returns them.

    Returns:
        `dict[str, SparsePatch]`: The patches that restore every bit.

    Raises:
        `ValueError`: If a tensor is missing, or is not the one that the patch was made for. All tensors are then as
            before.
    """
    done: dict[str, SparsePatch] = {}
    try:
        for name, patch in patches.items():
            if name not in tensors:
                raise ValueError(f"There is no tensor '{name}', which the patch changes.")
            done[name] = patch.apply(tensors[name])
    except ValueError:
        for name, patch in done.items():
            patch.apply(tensors[name])
        raise
    return done
