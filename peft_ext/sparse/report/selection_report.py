"""Report of the selected entries per layer and block, and of their overlap between adapters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...io import write_atomically
from ..bases.neurons import base_model_of
from ..layers import SparseLayer


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerCount:
    """
    What one adapter trains in one layer.

    Attributes:
        adapter, module, block (`str`): names; `block` is the repeated part of the model that the module is in.
        entries (`int`): selected weights.
        biases (`int`): trained biases.
        neurons (`int`): rows of the weight.
        weights (`int`): all entries of the weight.
    """

    adapter: str
    module: str
    block: str
    entries: int
    biases: int
    neurons: int
    weights: int


@dataclass(frozen=True)
class Overlap:
    """
    Positions that several adapters have in common.

    Attributes:
        adapters (`tuple[str, ...]`): which ones.
        shared (`int`): positions that all of them have selected.
        union (`int`): positions that any of them has selected.
        share (`float`): `shared` relative to the mean size of the adapters, in 0..1.
    """

    adapters: tuple[str, ...]
    shared: int
    union: int
    share: float


@dataclass(frozen=True)
class SelectionReport:
    """
    Counts and overlaps of sparse adapters, made by [`selection_report`]. `print(report)` shows a table.

    Attributes:
        counts (`list[LayerCount]`):
            Selected entries per adapter and layer.
        overlaps (`list[Overlap]`):
            Entries that adapters have in common: of each pair, and of all.
    """

    counts: list[LayerCount]
    overlaps: list[Overlap]

    @property
    def adapters(self) -> list[str]:
        return list(dict.fromkeys(count.adapter for count in self.counts))

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks, in the order of the model."""
        return list(dict.fromkeys(count.block for count in self.counts))

    def entries(self, adapter: str, block: str | None = None) -> int:
        """Number of selected weights of an adapter, in one block or in all."""
        return sum(c.entries for c in self.counts if c.adapter == adapter and block in (None, c.block))

    def distribution(self, adapter: str) -> dict[str, float]:
        """Share of the adapter's entries in each block. The shares add up to 1."""
        total = max(1, self.entries(adapter))
        return {block: self.entries(adapter, block) / total for block in self.blocks}

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values that JSON can store."""
        return {
            "counts": [asdict(count) for count in self.counts],
            "overlaps": [asdict(overlap) for overlap in self.overlaps],
            "distribution": {adapter: self.distribution(adapter) for adapter in self.adapters},
        }

    def plot(self) -> Figure:
        """
        Draw the distribution of every adapter over the blocks, with the overlaps beside it if there are several
        adapters. Needs matplotlib: `pip install 'peft-ext[plot]'`.
        """
        from .plot import draw

        return draw(self)

    def save(self, folder: str | Path) -> list[Path]:
        """
        Write the figure and its data.

        Args:
            folder (`str`):
                Folder for `selection_report.png` and `selection_report.json`. It is made if missing.

        Returns:
            `list[Path]`: The two files.
        """
        figure = self.plot()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        image, data = folder / "selection_report.png", folder / "selection_report.json"
        figure.savefig(image, dpi=150)
        write_atomically(str(data), json.dumps(self.as_dict(), indent=2) + "\n")
        return [image, data]

    def __str__(self) -> str:
        lines = []
        for adapter in self.adapters:
            mine = [count for count in self.counts if count.adapter == adapter]
            total, biases, weights = (sum(getattr(c, what) for c in mine) for what in ("entries", "biases", "weights"))
            percent = 100 * total / max(1, weights)
            lines.append(f"{adapter}: {total:,} of {weights:,} weights ({percent:.3f} %), {biases:,} biases")
            width = max(len(count.module) for count in mine)
            for c in mine:
                rate = f"{c.entries / c.neurons:.2f}".rjust(8)
                lines.append(f"  {c.module.ljust(width)}  {c.entries:>10,} of {c.weights:>12,} {rate} per neuron")
        for overlap in self.overlaps:
            lines.append(f"{' and '.join(overlap.adapters)}: {overlap.shared:,} shared ({100 * overlap.share:.1f} %)")
        return "\n".join(lines)


def selection_report(model: nn.Module, adapters: Sequence[str] | None = None) -> SelectionReport:
    """
    Count the entries that sparse adapters have selected in each layer, and compare adapters with each other.

    Args:
        model (`torch.nn.Module`):
            A model with sparse adapters. To compare adapters that were trained apart, load them all with
            `model.load_adapter(path, "name")`.
        adapters (`list[str]`, *optional*):
            Names of the adapters; by default all.

    Returns:
        [`SelectionReport`]: Counts per layer, overlaps of each pair of adapters, and the overlap of all.

    Raises:
        `ValueError`: If there is no adapter of that name, or its entries are not selected yet.

    Example:

        ```py
        >>> from peft_ext import selection_report

        >>> report = selection_report(model)
        >>> print(report)
        >>> report.save("report")  # a PNG and a JSON file
        ```
    """
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, SparseLayer)
    }
    present = list(dict.fromkeys(name for layer in layers.values() for name in layer.deltas))
    wanted = present if adapters is None else list(adapters)
    unknown = [name for name in wanted if name not in present]
    if unknown or not wanted:
        raise ValueError(
            f"adapters={wanted!r}: {unknown or 'none'} given; the model has the sparse adapters {present}."
        )
    counts = []
    positions: dict[str, list[Tensor]] = {name: [] for name in wanted}
    first = 0  # position of a layer's first weight, all layers in a row
    for name, layer in layers.items():
        weights = 0
        for adapter in wanted:
            if adapter not in layer.deltas:
                continue
            delta = layer.deltas[adapter]
            if delta.pending or delta.indices.is_meta:
                raise ValueError(f"The entries of adapter '{adapter}' are not known yet: load its checkpoint first.")
            support = delta.support.to("cpu")
            weights = support.rows * support.fan_in
            biases = 0 if delta.bias is None else delta.bias.numel()
            block = _block(model, name)
            counts.append(LayerCount(adapter, name, block, support.entries, biases, support.rows, weights))
            row, column = support.row_of_entry(), support.indices.reshape(-1).long()
            positions[adapter].append(first + row * support.fan_in + column)
        first += weights
    sets = {name: torch.cat(parts) for name, parts in positions.items()}
    groups: list[tuple[str, ...]] = list(combinations(wanted, 2))
    groups += [tuple(wanted)] if len(wanted) > 2 else []
    return SelectionReport(counts, [_overlap(group, [sets[name] for name in group]) for group in groups])


def _overlap(adapters: tuple[str, ...], positions: Sequence[Tensor]) -> Overlap:
    _, held_by = torch.cat(list(positions)).unique(return_counts=True)
    shared = int((held_by == len(positions)).sum())
    size = sum(part.numel() for part in positions) / len(positions)
    return Overlap(adapters, shared, held_by.numel(), shared / max(1.0, size))


def _block(model: nn.Module, module: str) -> str:
    """The innermost item of a module list around a module, or what the module is directly in."""
    root = base_model_of(model)
    parts = module.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        if isinstance(root.get_submodule(".".join(parts[: depth - 1])), nn.ModuleList):
            return ".".join(parts[:depth])
    return ".".join(parts[:-1]) or module


def short_names(names: Iterable[str]) -> list[str]:
    """Names without the leading parts that all of them share."""
    split = [name.split(".") for name in names]
    common = 0
    while all(len(parts) > common + 1 for parts in split) and len({parts[common] for parts in split}) == 1:
        common += 1
    return [".".join(parts[common:]) for parts in split]
