"""Find the tensors of a checkpoint that hold the weight of a module."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..sparse.bases.projection import PROJECTIONS
from .checkpoint import Checkpoint, Stored
from .experts import pieces_of, sources_of
from .piece import Piece, in_one_tensor


class Names:
    """From names in a model to names in its checkpoint: equal, or as transformers renames them when it loads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def key(self, name: str) -> str | None:
        """The checkpoint's name of one of the model's tensors, if it has that tensor as it is."""
        return name if name in self.checkpoint.tensors else self._by_model_name[0].get(name)

    def ways(self, module: str, rows: int, fan_in: int) -> list[list[Piece]]:
        """
        The ways in which tensors may hold a module's weight: two if a square one does not show whether neurons are
        its rows or its columns.

        Raises:
            `ValueError`: if the checkpoint has no such weight, or one of another shape.
        """
        key = self.key(f"{module}.weight") or self.key(module)
        if key is None:
            apart = pieces_of(self.checkpoint, self._by_model_name[1].get(module, []), rows, fan_in)
            return [apart or [self._in_attention(module, rows, fan_in)]]
        pieces = in_one_tensor(key, self.checkpoint.tensors[key].shape, rows, fan_in)
        if not pieces:
            raise ValueError(_other_shape(self.checkpoint, key, rows, fan_in))
        return [[piece] for piece in pieces]

    def _in_attention(self, module: str, rows: int, fan_in: int) -> Piece:
        parent, _, part = module.rpartition(".")
        key = self.key(f"{parent}.in_proj_weight") if part in PROJECTIONS else None
        if key is None:
            raise ValueError(
                f"{self.checkpoint.folder} has no tensor '{module}.weight' of its own, which the adapter trains: it "
                "is another model's, is tied to another weight, or is made of several tensors. Load the adapter in "
                "Python, and save what merge_and_unload() returns."
            )
        if self.checkpoint.tensors[key].shape != (3 * rows, fan_in):
            raise ValueError(_other_shape(self.checkpoint, key, 3 * rows, fan_in))
        return Piece(key, 3 * rows, first_row=-PROJECTIONS.index(part) * rows)

    def bias(self, module: str, rows: int) -> tuple[str, int]:
        """
        Where a module's bias lies: the tensor's name and its first number.

        Raises:
            `ValueError`: if the checkpoint has none.
        """
        key, first = self.key(f"{module}.bias"), 0
        parent, _, part = module.rpartition(".")
        if key is None and part in PROJECTIONS:
            key, first = self.key(f"{parent}.in_proj_bias"), PROJECTIONS.index(part) * rows
        if key is None or first + rows > self.checkpoint.tensors[key].shape[0]:
            raise ValueError(
                f"{self.checkpoint.folder} has no bias for '{module}', which the adapter trains: merge it in Python."
            )
        return key, first

    @cached_property
    def _by_model_name(self) -> tuple[dict[str, str], dict[str, list[tuple[int, str]]]]:
        """By the model's names, the checkpoint's tensors: those that transformers loads one by one, and those that it
        fuses, each with its pattern's number."""
        model = empty_model(str(self.checkpoint.folder))
        if model is None:
            return {}, {}
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        prefix, state = model.base_model_prefix, model.state_dict()
        orders = {pattern: n for c in converters for n, pattern in enumerate(sources_of(c) or ())}
        names: dict[str, str] = {}
        fused: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for key in self.checkpoint.tensors:
            name, converter = rename_source_key(key, renamings, converters, prefix, state)
            if converter is None:
                # The adapter may have been made on the model without its head, or with another one.
                names[name] = key
                names.setdefault(name.removeprefix(f"{prefix}."), key)
                names.setdefault(f"{prefix}.{name}", key)
            elif converter in orders:
                fused[name].append((orders[converter], key))
        return names, dict(fused)


def empty_model(name: str) -> Any:
    """A model without memory for its weights, or `None` if it is not at hand or transformers does not know it."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        return None
    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    if model_class is None:
        return None
    with torch.device("meta"):
        return model_class(config)


def _other_shape(checkpoint: Checkpoint, key: str, rows: int, fan_in: int) -> str:
    stored: Stored = checkpoint.tensors[key]
    return (
        f"'{key}' in {checkpoint.folder / stored.file} has the shape {stored.shape}, but the adapter was made for "
        f"{rows} neurons of {fan_in} inputs: it is another model's."
    )
