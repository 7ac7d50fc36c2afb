"""Who competes with whom: the inputs of one neuron, or all entries of several weights. Ties go to the lowest index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ..support import Support, offsets_from_counts


# One pass over the scores; called several times, must yield the same each time.
ScorePass = Callable[[], Iterable[Tensor]]


def top_per_neuron(scores: Iterable[Tensor], k: int, fan_in: int) -> Support:
    """
    The k best entries of each row.

    Args:
        scores: chunks `[some rows, fan_in]` in row order.
        k (`int`): entries per row, at most `fan_in`.
        fan_in (`int`): columns.
    """
    return Support(torch.cat([_top_of_rows(chunk, k) for chunk in scores]), fan_in)


def _top_of_rows(scores: Tensor, k: int) -> Tensor:
    rows, fan_in = scores.shape
    if k == fan_in:
        return torch.arange(fan_in, dtype=torch.int32, device=scores.device).repeat(rows, 1)
    last = scores.topk(k, dim=1).values[:, -1:]  # [rows, 1]
    chosen = scores > last
    tied = scores == last
    # topk breaks ties arbitrarily, so it only finds the threshold; the lowest tied columns fill up the row.
    missing = k - chosen.sum(1, keepdim=True)
    chosen |= tied & (tied.cumsum(1, dtype=torch.int32) <= missing)
    return chosen.nonzero()[:, 1].view(rows, k).to(torch.int32)


def top_overall(passes: Mapping[str, ScorePass], budget: int, fan_ins: Mapping[str, int]) -> dict[str, Support]:
    """
    The `budget` best entries among all weights together, as ragged supports (a weight may get none).

    Exact selection in three passes without a copy of the scores: two histograms of 16 bits each find the threshold.

    Args:
        passes: per module, a function that starts a pass over its score chunks.
        budget (`int`): number of entries, at most the number of scores.
        fan_ins: per module, its number of columns.
    """
    threshold, ties = _threshold(passes, budget)
    supports = {}
    for module, scores in passes.items():
        columns, counts = [], []
        for key in map(_ordered_key, scores()):
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
    """int32 keys that order as the fp32 scores do."""
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0: they tie
    return torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


def _threshold(passes: Mapping[str, ScorePass], budget: int) -> tuple[int, int]:
    """The key of the budget-th best entry and how many entries with that key belong to the best."""

    def keys() -> Iterator[Tensor]:
        for scores in passes.values():
            yield from map(_ordered_key, scores())

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
