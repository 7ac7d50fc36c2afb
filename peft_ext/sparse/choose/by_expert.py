"""Entries of fused experts are chosen expert by expert: each one's matrix is a weight of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..bases.experts import ExpertBank
from ..bases.neurons import experts_of
from ..config import SparseConfig
from ..support import Support, stacked, without_entries


class ExpertMatrices:
    """Several weights by name, of which those of experts fall into a matrix for each expert that the config adapts."""

    def __init__(self, bases: Mapping[str, Any], config: SparseConfig) -> None:
        self.bases = bases
        self.numbers = {name: adapted_experts(name, base, config) for name, base in bases.items() if experts_of(base)}
        self.origin = {f"{name}.{number}": (name, number) for name, ns in self.numbers.items() for number in ns}

    def split(self, views: Mapping[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
        """Functions that return the matrices, or their scores, from those that return the weights or theirs."""
        plain = {name: view for name, view in views.items() if name not in self.numbers}
        read = _Latest(views)
        return plain | {key: partial(read.one, name, number) for key, (name, number) in self.origin.items()}

    def join(self, supports: Mapping[str, Support]) -> dict[str, Support]:
        """The supports of the weights, from those of the matrices."""
        joined = {name: support for name, support in supports.items() if name not in self.origin}
        for name, numbers in self.numbers.items():
            bank = self.bases[name]
            device = next((supports[f"{name}.{number}"].indices.device for number in numbers), torch.device("cpu"))
            none = without_entries(bank.rows, bank.in_features, device)
            joined[name] = stacked([supports.get(f"{name}.{number}", none) for number in range(bank.number)])
        return joined


class _Latest:
    """Weights of all experts, read one by one. The last one is kept, for each expert's matrix is asked for in turn and
    reading may mean dequantising, gathering or computing scores."""

    def __init__(self, views: Mapping[str, Callable[[], Tensor]]) -> None:
        self.views = views
        self._last: tuple[str, Tensor] | None = None

    def one(self, name: str, number: int) -> Tensor:
        """The matrix of one expert."""
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self.views[name]()
        return self._last[1][number]


def adapted_experts(name: str, bank: ExpertBank, config: SparseConfig) -> list[int]:
    """
    Numbers of the experts that a config adapts in a weight. Raises `ValueError` if there is no such expert, or none is
    named.
    """
    wanted = config.experts_to_transform
    if wanted is None:
        return list(range(bank.number))
    if isinstance(wanted, dict):
        module = name.rpartition(".")[0]
        found = next((numbers for key, numbers in wanted.items() if f".{module}".endswith(f".{key}")), None)
        if found is None:
            raise ValueError(f"experts_to_transform lacks '{module}'; name its experts, or exclude it.")
        wanted = found
    beyond = [number for number in wanted if not 0 <= number < bank.number]
    if beyond or not wanted:
        raise ValueError(
            f"experts_to_transform={wanted!r}: '{name}' has the experts 0 to {bank.number - 1}; name some of these."
        )
    return sorted(set(wanted))
