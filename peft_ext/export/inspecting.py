"""Content of adapters' files: entries per module, how far they moved, and the overlap of adapters."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from .adapter import AdapterFile


@dataclass(frozen=True)
class ModuleFacts:
    """
    What an adapter trains in one module.

    Attributes:
        module (`str`): its name in the model.
        neurons, fan_in (`int`): shape of its weight.
        entries, biases (`int`): trained numbers.
        norm, largest (`float`): 2-norm of the values, and the largest magnitude.
    """

    module: str
    neurons: int
    fan_in: int
    entries: int
    biases: int
    norm: float
    largest: float

    @property
    def share(self) -> float:
        """Trained entries as a share of the module's weights."""
        return self.entries / (self.neurons * self.fan_in)


@dataclass(frozen=True)
class AdapterFacts:
    """
    What is in an adapter's folder.

    Attributes:
        adapter (`str`): the folder or Hub id.
        method, base (`str`), selection (`str`, *optional*), k (`int`, *optional*): of its options.
        version (`str`, *optional*): of peft_ext, which wrote it.
        file_bytes (`int`): size of the file of weights.
        modules (`list[ModuleFacts]`): one per adapted module.
        whole (`dict[str, int]`): numbers in tensors that replace the base's, by name, trained tokens among them.
        parameters (`int`): all trained numbers.
    """

    adapter: str
    method: str
    base: str
    selection: str | None
    k: int | None
    version: str | None
    file_bytes: int
    modules: list[ModuleFacts]
    whole: dict[str, int]

    @property
    def parameters(self) -> int:
        return sum(m.entries + m.biases for m in self.modules) + sum(self.whole.values())


@dataclass(frozen=True)
class SharedEntries:
    """Entries that two adapters have in common: how many, and as a share of the smaller one's."""

    adapters: tuple[str, str]
    shared: int
    share: float


@dataclass(frozen=True)
class Inspection:
    """Report made by [`inspect_adapters`]; `str` shows it as a table."""

    adapters: list[AdapterFacts]
    overlaps: list[SharedEntries]

    def as_dict(self) -> dict[str, Any]:
        """The content as JSON takes it."""
        return {
            "adapters": [
                {**asdict(facts), "parameters": facts.parameters}
                | {"modules": [asdict(m) | {"share": m.share} for m in facts.modules]}
                for facts in self.adapters
            ],
            "overlaps": [asdict(overlap) for overlap in self.overlaps],
        }

    def __str__(self) -> str:
        lines = [line for facts in self.adapters for line in _lines(facts)]
        for overlap in self.overlaps:
            lines.append(f"{' and '.join(overlap.adapters)}: {overlap.shared:,} shared ({100 * overlap.share:.1f} %)")
        return "\n".join(lines)


@torch.no_grad()
def inspect_adapters(adapters: Sequence[str | os.PathLike[str]]) -> Inspection:
    """
    Read what adapters train from their files. The base model is not needed.

    Args:
        adapters (`list[str]`):
            Folders or Hub ids of adapters.

    Returns:
        [`Inspection`]: Facts on each adapter, and the entries that each pair of sparse adapters has in common.

    Raises:
        `ValueError`: If one of them is no adapter, or its file is damaged.
    """
    facts, positions = [], {}
    for name in adapters:
        with AdapterFile(name) as adapter:
            facts.append(_facts(adapter))
            if adapter.is_sparse:
                positions[adapter.name] = _positions(adapter)
    pairs = combinations(positions, 2)
    return Inspection(facts, [_overlap(pair, positions[pair[0]], positions[pair[1]]) for pair in pairs])


def _facts(adapter: AdapterFile) -> AdapterFacts:
    config: Any = adapter.config
    modules = [_module(adapter, name) for name in adapter.modules] if adapter.is_sparse else []
    keys = [key for _, key in adapter.whole()] + [key for _, key, _ in adapter.tokens()] if modules else adapter.keys
    return AdapterFacts(
        adapter.name,
        adapter.method,
        str(config.base_model_name_or_path or "not named"),
        getattr(config, "selection", None),
        getattr(config, "k", None),
        getattr(config, "peft_ext_version", None),
        adapter.path.stat().st_size,
        modules,
        {key: adapter.tensor(key).numel() for key in keys},
    )


def _module(adapter: AdapterFile, name: str) -> ModuleFacts:
    entries = adapter.entries(name)
    values, biases = entries.values.double(), 0 if entries.bias is None else entries.bias.numel()
    largest = float(values.abs().max()) if values.numel() else 0.0
    rows, fan_in = entries.support.rows, entries.support.fan_in
    return ModuleFacts(name, rows, fan_in, values.numel(), biases, float(values.norm()), largest)


def _positions(adapter: AdapterFile) -> dict[str, Tensor]:
    """Per module, where its entries lie in the flattened weight, increasing."""
    found = {}
    for name in adapter.modules:
        support = adapter.entries(name).support
        found[name] = support.row_of_entry() * support.fan_in + support.indices.reshape(-1).long()
    return found


def _overlap(pair: tuple[str, str], first: dict[str, Tensor], second: dict[str, Tensor]) -> SharedEntries:
    shared = sum(
        int(torch.isin(first[name], second[name], assume_unique=True).sum()) for name in first if name in second
    )
    smaller = min(sum(part.numel() for part in parts.values()) for parts in (first, second))
    return SharedEntries(pair, shared, shared / max(1, smaller))


def _lines(facts: AdapterFacts) -> list[str]:
    entries = sum(module.entries for module in facts.modules)
    weights = sum(module.neurons * module.fan_in for module in facts.modules)
    chosen = f", {facts.selection}" + (f", k={facts.k}" if facts.k else "") if facts.selection else ""
    lines = [
        f"{facts.adapter}: {facts.method}{chosen}, for {facts.base}",
        f"  {facts.parameters:,} parameters, {facts.file_bytes / 1e6:.3f} MB"
        + (f", written by peft_ext {facts.version}" if facts.version else ""),
    ]
    if facts.modules:
        biases = sum(module.biases for module in facts.modules)
        lines.append(f"  {entries:,} of {weights:,} weights ({100 * entries / weights:.3f} %), {biases:,} biases")
        width = max(len(module.module) for module in facts.modules)
        lines.append(f"  {'module'.ljust(width)}  {'entries':>10} {'share, %':>9} {'norm':>10} {'largest':>10}")
        lines += [
            f"  {m.module.ljust(width)}  {m.entries:>10,} {100 * m.share:>9.3f} {m.norm:>10.4g} {m.largest:>10.4g}"
            for m in facts.modules
        ]
    lines += [f"  whole: {name} ({count:,})" for name, count in facts.whole.items()]
    return lines
