"""
Measured costs that decide between the paths: `python examples/benchmarks/crossover.py`, fp32, two CPU threads, raw
times in `examples/benchmarks/results/crossover_cpu_fp32.json`.

The dense path costs by weights, the folded one by entries. What matters is their difference in a forward and backward
pass, so only what is not common to both is here. No GPU has been measured yet: `Share` for "cuda" is an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass


# Below this share of trained weights, a dense copy of W and its gradient are not worth a few percent of time.
MIN_DENSE_SHARE = 0.015


@dataclass(frozen=True)
class Costs:
    """
    Nanoseconds that the folded path takes per `entry`, per entry and token, and per `call`, and the dense path per
    `weight`, and per weight and token.
    """

    entry: float
    entry_token: float
    call: float
    weight: float
    weight_token: float

    def dense_pays(self, entries: int, weights: int, tokens: int) -> bool:
        """Whether the dense path is the faster one."""
        folded = entries * (self.entry + self.entry_token * tokens) + self.call
        dense = weights * (self.weight + self.weight_token * tokens)
        return entries > MIN_DENSE_SHARE * weights and folded > dense


@dataclass(frozen=True)
class Share:
    """The dense path from this share of trained weights on."""

    share: float

    def dense_pays(self, entries: int, weights: int, tokens: int) -> bool:
        """Whether the dense path is the faster one."""
        return entries > self.share * weights


# By device.
MEASURED: dict[str, Costs | Share] = {
    "cpu": Costs(entry=11.0, entry_token=0.048, call=150_000, weight=0.85, weight_token=0.0042),
    "cuda": Share(0.125),
}


def dense_pays(device_type: str, entries: int, weights: int, tokens: int) -> bool:
    """
    Whether composing W + S and one dense weight gradient are faster than the folded path.

    Args:
        device_type (`str`): as of `torch.device.type`; unknown ones are taken for a GPU.
        entries, weights, tokens (`int`): trained weights, weights, rows of x.
    """
    return MEASURED.get(device_type, MEASURED["cuda"]).dense_pays(entries, weights, tokens)
