"""
Measured costs that decide between the paths: `python examples/benchmarks/crossover.py`, fp32, two CPU threads, raw
times in `examples/benchmarks/results/crossover_cpu_fp32.json` and, for uneven rows, `crossover_uneven_cpu_fp32.json`.

The dense path costs by weights, the folded one by entries. What matters is their difference in a forward and backward
pass, so only what is not common to both is here. No GPU has been measured yet: `Share` for "cuda" is an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

from .bypass import FEW_TOKENS


# Below this share of trained weights, a dense copy of W and its gradient are not worth a few percent of time.
MIN_DENSE_SHARE = 0.015


@dataclass(frozen=True)
class Costs:
    """
    Nanoseconds that the folded path takes per `call`, per `entry`, and per entry and token. With more than a few
    tokens, when the gradient of the values transposes its operands, also per `bag_entry`, and per token and feature
    (`rows` and `fan_in` together) in `feature_token`. And what the dense path takes per `weight`, and per weight and
    token.
    """

    call: float
    entry: float
    bag_entry: float
    entry_token: float
    feature_token: float
    weight: float
    weight_token: float

    def dense_pays(self, entries: int, rows: int, fan_in: int, tokens: int) -> bool:
        """Whether the dense path is the faster one."""
        weights = rows * fan_in
        folded = self.call + entries * (self.entry + self.entry_token * tokens)
        if tokens > FEW_TOKENS:
            folded += self.bag_entry * entries + self.feature_token * (rows + fan_in) * tokens
        dense = weights * (self.weight + self.weight_token * tokens)
        return entries > MIN_DENSE_SHARE * weights and folded > dense


@dataclass(frozen=True)
class Share:
    """The dense path from this share of trained weights on."""

    share: float

    def dense_pays(self, entries: int, rows: int, fan_in: int, tokens: int) -> bool:
        """Whether the dense path is the faster one."""
        return entries > self.share * rows * fan_in


# By device: of supports with equally many entries in each row, and of uneven ones.
EVEN: dict[str, Costs | Share] = {
    "cpu": Costs(180_000, 1.28, 7.0, 0.044, 0.84, 0.7, 0.0062),
    "cuda": Share(0.125),
}
UNEVEN: dict[str, Costs | Share] = {
    "cpu": Costs(51_000, 1.24, 15.3, 0.0394, 0.8, 1.29, 0.0072),
    "cuda": Share(0.125),
}


def dense_pays(device_type: str, is_even: bool, entries: int, rows: int, fan_in: int, tokens: int) -> bool:
    """
    Whether composing W + S and one dense weight gradient are faster than the folded path.

    Args:
        device_type (`str`): as of `torch.device.type`; unknown ones are taken for a GPU.
        is_even (`bool`): each row has equally many entries.
        entries, rows, fan_in, tokens (`int`): trained weights, shape of the weight, rows of x.
    """
    costs = EVEN if is_even else UNEVEN
    return costs.get(device_type, costs["cuda"]).dense_pays(entries, rows, fan_in, tokens)
