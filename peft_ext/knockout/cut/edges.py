"""Pairs of token groups, and the attention edges between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


GENERATED = ("follow", "fixed")


def check_mask(mask: Any, name: str) -> Tensor:
    """
    A group of tokens as bool `[batch, sequence]`.

    Raises:
        `ValueError`: naming the argument, if it is something else or a row of it is empty.
    """
    if not isinstance(mask, Tensor):
        raise ValueError(f"{name} must be a bool tensor [batch, sequence], but is a {type(mask).__name__}.")
    if mask.dtype != torch.bool:
        raise ValueError(
            f"{name} must be a bool tensor, but its dtype is {mask.dtype}: use {name}.bool() if 1 means in."
        )
    if mask.dim() != 2 or 0 in mask.shape:
        raise ValueError(f"{name} must have the shape [batch, sequence], but has {tuple(mask.shape)}.")
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"{name} holds no token in row(s) {empty} of the batch, so nothing would be knocked out there: "
            "leave such samples out, or give another group."
        )
    return mask


@dataclass(frozen=True)
class Edges:
    """The edges of one pair: `target` may no longer attend to `source` (rows are targets)."""

    # Bool `[batch, sequence]`, over the prompt
    source: Tensor
    target: Tensor
    # Whether the group is the last position, which each generated token takes over. A generated token's edge to a
    # source that follows is the one to itself
    source_follows: bool = False
    target_follows: bool = False

    @property
    def length(self) -> int:
        """Tokens in the prompt."""
        return self.source.shape[1]

    def blocked(self, queries: range, keys: range, device: torch.device | None = None) -> Tensor:
        """
        Blocked edges, bool `[batch, queries, keys]`, of positions counted from the prompt's first token.

        Positions before the prompt (a prefix in the cache) belong to no group.
        """
        target = extend(self.target, queries, self.target_follows)
        source = extend(self.source, keys, False)
        edges = target.unsqueeze(2) & source.unsqueeze(1)  # [batch, queries, keys]
        if self.source_follows and queries.stop > self.length:
            at = torch.arange(queries.start, queries.stop, device=edges.device)
            to = torch.arange(keys.start, keys.stop, device=edges.device)
            own = (at[:, None] == to[None]) & target.unsqueeze(2)
            edges = torch.where((at >= self.length)[:, None], own, edges)
        return edges if device is None else edges.to(device)


def extend(mask: Tensor, positions: range, value: bool) -> Tensor:
    """A prompt's mask at any positions: False before the prompt, `value` after it."""
    length = mask.shape[1]
    at = torch.arange(positions.start, positions.stop, device=mask.device)
    inside = mask[:, at.clamp(0, length - 1)] & (at >= 0) & (at < length)
    return inside | (at >= length) if value else inside


def first_position(mask: Tensor) -> int:
    """The first position of a group in any row."""
    return int(mask.int().argmax(1).min())


def is_last(mask: Tensor) -> bool:
    """Whether a group is the last position of the prompt, and nothing else, in every row."""
    return bool(mask[:, -1].all() and mask.sum() == len(mask))


def check_pairs(pairs: Any, generated: str = "follow") -> list[Edges]:
    """
    Edges of `(source, target)` pairs.

    Raises:
        `ValueError`: naming the pair, the value and the remedy.
    """
    if generated not in GENERATED:
        raise ValueError(f'generated is {generated!r}: must be "follow" or "fixed".')
    if not isinstance(pairs, Sequence) or isinstance(pairs, str) or not pairs:
        raise ValueError(f"pairs must be a list of (source, target) masks with at least one pair, but is {pairs!r}.")
    if len(pairs) == 2 and all(isinstance(mask, Tensor) for mask in pairs):
        raise ValueError("pairs must be a list of (source, target) pairs: wrap the one pair in a list.")
    edges: list[Edges] = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"pairs[{number}] must be a (source, target) pair, but is {pair!r}.")
        source, target = (
            check_mask(mask, f"pairs[{number}] {name}") for mask, name in zip(pair, ("source", "target"), strict=True)
        )
        if source.shape != target.shape:
            raise ValueError(
                f"pairs[{number}]: source has the shape {tuple(source.shape)} and target {tuple(target.shape)}; "
                "both must be [batch, sequence] of the same inputs."
            )
        if edges and source.shape != edges[0].source.shape:
            raise ValueError(
                f"pairs[{number}] has the shape {tuple(source.shape)} and pairs[0] {tuple(edges[0].source.shape)}: "
                "all masks must be of the same inputs."
            )
        follow = generated == "follow"
        edges.append(Edges(source, target.to(source.device), follow and is_last(source), follow and is_last(target)))
    return edges
