"""
Measured costs that decide between the paths: `python examples/benchmarks/crossover.py`, fp32, two CPU threads, raw
times in `examples/benchmarks/results/crossover_cpu_fp32.json` and, for uneven rows, `crossover_uneven_cpu_fp32.json`.

The dense path costs by weights, the other two by entries. What matters is their difference in a forward and backward
pass, so what is common to all three (two dense products) is left out. On a GPU the share of trained weights decides:
31 points in fp32 on an H100 (`examples/benchmarks/results/gpu_h100/crossovers.json`), of which 25 are within 10 % of
the fastest path and all within 26 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from .bags import FEW_TOKENS


# Below this share of trained weights, a dense copy of W and its gradient are not worth a few percent of time.
MIN_DENSE_SHARE = 0.015


@dataclass(frozen=True)
class EntryCosts:
    """
    Nanoseconds of a path by entries: per call, per entry, per entry and token, and per token and feature (`rows` and
    `fan_in` together), whose activations it transposes.
    """

    call: float
    entry: float
    entry_token: float
    feature_token: float

    def of(self, entries: int, features: int, tokens: int) -> float:
        return self.call + entries * (self.entry + self.entry_token * tokens) + self.feature_token * features * tokens


@dataclass(frozen=True)
class Costs:
    """
    What the paths take: the folded one with a few tokens and with more (whose gradient of the values is computed in
    another way), the bypass, and the dense one in nanoseconds per weight, and per weight and token.
    """

    folded_few: EntryCosts
    folded: EntryCosts
    bypass: EntryCosts
    weight: float
    weight_token: float

    def fastest(self, entries: int, rows: int, fan_in: int, tokens: int) -> str:
        """The path that takes the least."""
        weights, features = rows * fan_in, rows + fan_in
        folded = self.folded_few if tokens <= FEW_TOKENS else self.folded
        costs = {
            "folded": folded.of(entries, features, tokens),
            "bypass": self.bypass.of(entries, features, tokens),
        }
        if entries > MIN_DENSE_SHARE * weights:
            costs["dense"] = weights * (self.weight + self.weight_token * tokens)
        return min(costs, key=costs.__getitem__)


@dataclass(frozen=True)
class Shares:
    """
    Shares of trained weights up to which the bypass is taken, and then the folded path; the dense one beyond. With
    fewer than `many_tokens` the bypass is taken in the folded path's place.
    """

    bypass: float
    folded: float
    many_tokens: int

    def fastest(self, entries: int, rows: int, fan_in: int, tokens: int) -> str:
        """The path to take."""
        share = entries / (rows * fan_in)
        if share > self.folded:
            return "dense"
        return "bypass" if share <= self.bypass or tokens < self.many_tokens else "folded"


# On a CPU: of supports with equally many entries in each row, and of uneven ones.
EVEN = Costs(
    folded_few=EntryCosts(195_000, 1.0, 0.0524, 0),
    folded=EntryCosts(187_000, 11.6, 0.0524, 0.803),
    bypass=EntryCosts(260_000, 6.83, 0.129, 3.03),
    weight=0.727,
    weight_token=0.00875,
)
UNEVEN = Costs(
    folded_few=EntryCosts(110_000, 1.0, 0.052, 0),
    folded=EntryCosts(110_000, 24.4, 0.052, 0.78),
    bypass=EntryCosts(423_000, 3.42, 0.107, 3.3),
    weight=2.14,
    weight_token=0.0081,
)
GPU = Shares(0.015, 0.05, 256)


def fastest_path(device_type: str, is_even: bool, entries: int, rows: int, fan_in: int, tokens: int) -> str:
    """
    "folded", "bypass" or "dense", whichever is expected to be the fastest in training. Unknown types of devices are
    taken for a GPU; `is_even`: each row has equally many entries; `entries` and `tokens` are trained weights and rows
    of x.
    """
    costs = GPU if device_type != "cpu" else EVEN if is_even else UNEVEN
    return costs.fastest(entries, rows, fan_in, tokens)
