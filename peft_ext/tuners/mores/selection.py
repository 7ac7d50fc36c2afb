"""Selection of the steered tokens: ends, first, last, uniform, random or all. Pure functions of masks."""

from __future__ import annotations

import re

import torch
from torch import Tensor


SELECTIONS = ("ends", "first", "last", "uniform", "random", "all")
GROUPINGS = ("image", "sample")
_POSITIONS = re.compile(r"(?:f(?P<first>\d+))?(?:\+?l(?P<last>\d+))?")


def select_tokens(mask: Tensor, ratio: float, selection: str, seed: int = 0, grouping: str = "image") -> Tensor:
    """
    Choose a share of the tokens of each group.

    Args:
        mask (`torch.Tensor`): bool `[batch, tokens]`, the tokens to choose from, such as the visual ones.
        ratio (`float`): share of a group's tokens, rounded, at least one token of each group.
        selection (`str`):
            `"ends"` the first and the last (of an odd number, the last get one more: 4 + 5 of 9, as in MoReS's
            published recipe), `"first"`, `"last"`, `"uniform"` evenly spread, `"random"` the same ranks for every
            group of the same size, or `"all"`.
        seed (`int`): of `"random"`.
        grouping (`str`): `"image"`, each run of neighbouring tokens is a group; or `"sample"`, a row's tokens are.

    Returns:
        `torch.Tensor`: bool `[batch, tokens]`, a subset of `mask`.
    """
    if selection == "all":
        return mask
    rows = torch.arange(len(mask), device=mask.device).unsqueeze(1).expand_as(mask)
    if grouping == "image":
        starts = mask.clone()
        starts[:, 1:] &= ~mask[:, :-1]
        group = starts.flatten().cumsum(0).view_as(mask) - 1  # a row begins a new run whatever the last one ended with
    else:
        group = rows
    group = group.clamp(min=0)
    counts = torch.zeros(mask.numel() + 1, dtype=torch.int64, device=mask.device)  # never more groups than tokens
    counts.scatter_add_(0, group.flatten(), mask.flatten().long())
    before = counts.cumsum(0) - counts  # tokens in earlier groups
    rank = mask.flatten().cumsum(0).view_as(mask) - 1 - before[group]  # of a token in its group
    count = counts[group]
    wanted = (counts * ratio).round().long().clamp(min=1)[group].minimum(count)
    if selection == "ends":
        chosen = (rank < wanted // 2) | (rank >= count - (wanted - wanted // 2))
    elif selection == "first":
        chosen = rank < wanted
    elif selection == "last":
        chosen = rank >= count - wanted
    elif selection == "uniform":  # the centres of `wanted` equal parts
        half = count // 2
        share = count.clamp(min=1)
        chosen = ((rank + 1) * wanted + half) // share > (rank * wanted + half) // share
    else:
        chosen = _smallest(mask, group, _hash(rank, seed), before) < wanted
    return chosen & mask


def _hash(rank: Tensor, seed: int) -> Tensor:
    """Numbers in [0, 2³¹) that look random; the same on every device, unlike a generator's."""
    value = (rank + 1) * 0x9E3779B1 + (seed % 2**31) * 0x85EBCA77
    for factor in (0x7FEB352D, 0x2C1B3C6D):
        value = value & 0x7FFFFFFF
        value = ((value ^ (value >> 15)) * factor) & 0x7FFFFFFF
    return value ^ (value >> 16)


def _smallest(mask: Tensor, group: Tensor, score: Tensor, before: Tensor) -> Tensor:
    """Each masked token's place among its group's scores, 0 the smallest; ties in order of the tokens."""
    place = torch.zeros_like(score)
    by_token = (group << 31) + score  # scores are below 2³¹
    where = mask.flatten().nonzero().squeeze(1)
    where = where[by_token.flatten()[where].argsort(stable=True)]
    place.view(-1)[where] = torch.arange(len(where), device=where.device) - before[group.flatten()[where]]
    return place


def parse_positions(text: str) -> tuple[int, int]:
    """
    Read `token_positions` in LoReFT's notation: `"f7+l7"` is the first seven and the last seven, `"l1"` the last one.

    Raises:
        `ValueError`: if it is not of that form.
    """
    match = _POSITIONS.fullmatch(text) if isinstance(text, str) else None
    first, last = (int(match[name] or 0) if match else 0 for name in ("first", "last"))
    if first + last == 0:
        raise ValueError(
            f"token_positions={text!r} is not of the form 'f7+l7' (the first and the last seven prompt tokens), 'f7' "
            "or 'l7'."
        )
    return first, last


def select_positions(mask: Tensor, first: int, last: int) -> Tensor:
    """
    The first and last tokens of each row's prompt, a subset of `mask`, bool `[batch, tokens]`. A shorter prompt is
    chosen whole.
    """
    rank = mask.long().cumsum(1) - 1
    count = mask.sum(1, keepdim=True)
    return mask & ((rank < first) | (rank >= count - last))
