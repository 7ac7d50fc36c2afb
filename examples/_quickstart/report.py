"""The table on the screen and the JSON file beside it."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .search import Search


PACKAGES = ("peft-ext", "peft", "transformers", "trl", "torch", "scikit-learn", "datasets", "numpy")


@dataclass
class Row:
    """Everything measured for one method; times and sizes as they were measured, ratios as the table shows them."""

    name: str
    label: str
    learning_rate: float
    search: Search | None
    adapter_parameters: int
    head_parameters: int
    seeds: list[int]
    scores: list[float]
    step_seconds: list[float]
    step_ratio: float
    peak_bytes: int
    peak_ratio: float
    file_bytes: int

    @property
    def trained_parameters(self) -> int:
        return self.adapter_parameters + self.head_parameters

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float:
        """Sample standard deviation over the seeds; 0 where there is one seed only."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0

    @property
    def edge(self) -> str | None:
        return self.search.edge if self.search else None

    def as_json(self) -> dict[str, Any]:
        numbers = asdict(self) | {"trained_parameters": self.trained_parameters}
        numbers |= {"mean": self.mean, "standard_deviation": self.deviation, "learning_rate_at_edge": self.edge}
        return numbers


def _score(row: Row, percent: bool) -> str:
    factor, digits = (100, 1) if percent else (1, 3)
    spread = f" ± {factor * row.deviation:.{digits}f}" if len(row.scores) > 1 else ""
    return f"{factor * row.mean:.{digits}f}{spread}"


def table(rows: Sequence[Row], metric: str, percent: bool, reference: str) -> str:
    """Aligned plain text, one line per method."""
    header = [
        ["method", "lr", "adapter", "trained", metric, "step time", "peak mem", "file"],
        ["", "", "params", "params", "%" if percent else "", f"/ {reference}", f"/ {reference}", "kB"],
    ]
    lines = header + [
        [
            row.label,
            f"{row.learning_rate:g}{'*' if row.edge else ''}",
            f"{row.adapter_parameters:,}",
            f"{row.trained_parameters:,}",
            _score(row, percent),
            f"{row.step_ratio:.2f}",
            f"{row.peak_ratio:.2f}",
            f"{row.file_bytes / 1000:,.1f}",
        ]
        for row in rows
    ]
    text = aligned(lines, headers=len(header))
    if any(row.edge for row in rows):
        text.append("* best learning rate at the edge of its grid: a wider search might do better")
    return "\n".join(text)


def aligned(lines: Sequence[Sequence[str]], headers: int) -> list[str]:
    """Cells in columns, the first to the left and the others to the right, with a rule below the header lines."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    text = ["  ".join(cells) for cells in rows]
    text.insert(headers, "-" * len(text[0]))
    return [line.rstrip() for line in text]


def environment() -> dict[str, Any]:
    """Versions and the machine, for whoever reads the numbers later."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # trl and datasets are needed for --model only
            continue
    return {
        "versions": versions,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
