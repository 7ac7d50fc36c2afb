"""Scopes of a selection: the inputs of one neuron, or all entries of several weights. Ties go to the lowest index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ..support import Support, offsets_from_counts


# One pass over the scores; called several times, must yield the same each time.
ScorePass = Callable[[], Iterable[Tensor]]
# Keys per group, of which only the largest is compared first. Fastest of 8 to 64 for k=20 of 2048 and 8192.
GROUP = 16
# How often `top_overall` goes over the scores.
PASSES_OVERALL = 3


def top_per_neuron(scores: Iterable[Tensor], k: int, fan_in: int) -> Support:
    """The k best entries of each row, of chunks of scores `[some rows, fan_in]` in row order."""
    return Support(torch.cat([_top_of_rows(chunk, k) for chunk in scores]), fan_in)


def _top_of_rows(scores: Tensor, k: int) -> Tensor:
    rows, fan_in = scores.shape
    if k == fan_in:
        return torch.arange(fan_in, dtype=torch.int32, device=scores.device).repeat(rows, 1)
    keys, column_bits = _distinct_keys(scores)
    if k == 1:
        best = keys.amax(1, keepdim=True)
    else:
        best = _candidates(keys, k).topk(k, dim=1, sorted=False).values
    columns = fan_in - 1 - (best & (2**column_bits - 1))
    return columns.to(torch.int32).sort(dim=1).values


def _distinct_keys(scores: Tensor) -> tuple[Tensor, int]:
    """
    Integers that order as the scores do, among equal ones the lowest column first, and the number of their low bits
    that hold the column, counted from the end. No two in a row are equal, so the best k are the same on every device.
    """
    fan_in = scores.shape[1]
    columns = torch.arange(fan_in - 1, -1, -1, device=scores.device)
    if scores.element_size() == 2 and fan_in <= 2**16:
        keys = _ordered_key(scores).to(torch.int32)
        return keys.mul_(2**16).add_(columns.to(torch.int32)), 16
    keys = _ordered_key(scores.float()).long()
    return keys.mul_(2**32).add_(columns), 32


def _candidates(keys: Tensor, k: int) -> Tensor:
    """
    Some of the keys of each row, the k largest among them. Every group of `GROUP` keys that holds one of these is
    among the k groups with the largest maxima, which two passes over the row find: a fifth of the time of `topk`.
    """
    rows, fan_in = keys.shape
    groups = fan_in // GROUP
    if 2 * k > groups:
        return keys
    grouped, rest = keys[:, : groups * GROUP].view(rows, GROUP, groups), keys[:, groups * GROUP :]
    best = grouped.amax(1).topk(k, dim=1, sorted=False).indices  # [rows, k]
    members = grouped.gather(2, best[:, None].expand(rows, GROUP, k))
    return torch.cat([members.view(rows, -1), rest], 1)


def top_overall(passes: Mapping[str, ScorePass], budget: int, fan_ins: Mapping[str, int]) -> dict[str, Support]:
    """
    The `budget` best entries among all weights together, as ragged supports (a weight may get none).

    Exact selection in three passes without a copy of the scores: two histograms of 16 bits each find the threshold.
    `passes`: per module, a function that starts a pass over its score chunks.
    """
    threshold, ties = _threshold(passes, budget)
    supports = {}
    for module, scores in passes.items():
        columns, counts = [], []
        for key in map(_ordered_key, map(Tensor.float, scores())):
            chosen = key > threshold
            tied = (key == threshold).reshape(-1)
            if ties:
                place = tied.cumsum(0)
                chosen |= (tied & (place <= ties)).view_as(chosen)
                ties -= min(ties, int(place[-1]))
            columns.append(chosen.nonzero()[:, 1].to(torch.int32))
            counts.append(chosen.sum(1))
        supports[module] = Support(torch.cat(columns), fan_ins[module], offsets_from_counts(torch.cat(counts)))
    return supports


def _ordered_key(scores: Tensor) -> Tensor:
    """Integers of the scores' width (int16 or int32) that order as they do."""
    bits = (scores + 0.0).view(torch.int16 if scores.element_size() == 2 else torch.int32)  # -0.0 and 0.0 tie
    sign = bits >> torch.iinfo(bits.dtype).bits - 1  # 0 or -1
    return bits ^ (sign & torch.iinfo(bits.dtype).max)


def _threshold(passes: Mapping[str, ScorePass], budget: int) -> tuple[int, int]:
    """The key of the budget-th best entry and how many entries with that key belong to the best."""

    def keys() -> Iterator[Tensor]:
        for scores in passes.values():
            yield from map(_ordered_key, map(Tensor.float, scores()))

    high, above = _bin_of(((key >> 16) + 2**15 for key in keys()), budget)
    low, above = _bin_of((key[(key >> 16) + 2**15 == high] & 0xFFFF for key in keys()), budget - above, above)
    return ((high - 2**15) << 16) + low, budget - above


def _bin_of(codes: Iterable[Tensor], rank: int, above: int = 0) -> tuple[int, int]:
    """Among codes in 0..65535: the code of the rank-th largest, and `above` plus the number of larger ones."""
    histogram = torch.zeros(2**16, dtype=torch.int64)
    for code in codes:
        histogram += torch.bincount(code.reshape(-1), minlength=2**16).cpu()
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, rank))
    larger = int(from_top[place - 1]) if place else 0
    return 2**16 - 1 - place, above + larger
