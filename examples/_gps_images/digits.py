"""The offline comparison: models that know digits 0-4 learn 5-9, with every method."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from _quickstart import comparison, data
from _quickstart.comparison import Comparison, Settings
from _quickstart.methods import trained_parameters
from _quickstart.report import aligned
from _quickstart.search import SPACING, Search
from torch import nn

from peft_ext import selection_report

from .methods import methods
from .models import Architecture


# Learning rates per method. Four, the quick start's, left a third of the best ones at the edge of their grids.
TRIALS = 8


@dataclass
class Row:
    """One method on one model."""

    model: str
    method: str
    label: str
    learning_rate: float
    search: Search
    adapter_parameters: int
    head_parameters: int
    scores: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0

    def as_json(self) -> dict[str, Any]:
        extra = {"mean": self.mean, "standard_deviation": self.deviation, "learning_rate_at_edge": self.search.edge}
        return asdict(self) | extra


class DigitsComparison(Comparison):
    """
    One model and all methods.

    Args:
        architecture (`Architecture`): The model.
        settings (`Settings`): Sizes of the runs.
        digits (`data.Digits`): Data.
        k (`int`): Entries per neuron.
        out (`Path`): Folder for the base model and the selection report.
    """

    def __init__(self, architecture: Architecture, settings: Settings, digits: data.Digits, k: int, out: Path):
        rows = methods(digits.train, architecture.linears, k)
        super().__init__(settings, digits, rows, out)
        self.architecture = architecture

    def build_base(self) -> nn.Module:
        return self.architecture.build(self.settings.hidden == comparison.SMOKE.hidden)

    def compare(self) -> list[Row]:
        """All rows; writes what GPS and its whole-network variant have selected beside them."""
        rows = []
        for method in self.methods:
            found, scores, model = self.adapt(method)
            adapter, head = trained_parameters(model)
            rows.append(
                Row(
                    model=self.architecture.label,
                    method=method.name,
                    label=method.label,
                    learning_rate=found.best.learning_rate,
                    search=found,
                    adapter_parameters=adapter,
                    head_parameters=head,
                    scores=scores,
                )
            )
            if method.name in ("gps", "gps_network"):
                selection_report(model).save(self.out / method.name)
        self.progress.set_description(f"{self.architecture.label} done")
        self.progress.close()
        return rows


def table(rows: Sequence[Row]) -> str:
    """Aligned plain text, one line per method, the models side by side."""
    models = list(dict.fromkeys(row.model for row in rows))
    header = ["method"]
    for model in models:
        header += [f"{model}: params", "lr", "accuracy, %"]
    lines = [header]
    for label in dict.fromkeys(row.label for row in rows):
        line = [label]
        for model in models:
            row = next(row for row in rows if (row.model, row.label) == (model, label))
            rate = f"{row.learning_rate:g}{'*' if row.search.edge else ''}"
            line += [f"{row.adapter_parameters:,}", rate, f"{100 * row.mean:.1f} ± {100 * row.deviation:.1f}"]
        lines.append(line)
    text = aligned(lines, headers=1)
    if any(row.search.edge for row in rows):
        text.append("* best learning rate at the edge of its grid: a wider search might do better")
    return "\n".join(text)


def run(
    architectures: Sequence[Architecture], smoke: bool, k: int, seeds: int | None, trials: int | None, out: Path
) -> tuple[str, dict[str, Any]]:
    """
    Args:
        architectures (`Sequence[Architecture]`): Models to compare on.
        smoke (`bool`): Smallest possible run.
        k (`int`), seeds (`int`, *optional*), trials (`int`, *optional*): Settings; by default the quick start's
            seeds and `TRIALS` learning rates.
        out (`Path`): Output folder.

    Returns:
        What to print, and the content of the JSON.
    """
    settings = comparison.SMOKE if smoke else replace(comparison.QUICK, trials=TRIALS)
    settings = replace(settings, seeds=seeds or settings.seeds, trials=trials or settings.trials)
    digits = data.load()
    rows: list[Row] = []
    notes = []
    for architecture in architectures:
        job = DigitsComparison(architecture, settings, digits, k, out / architecture.name)
        accuracy = job.pretrain()
        parameters = sum(p.numel() for p in job.base.parameters())
        notes.append(
            f"{architecture.label}: {parameters:,} parameters, {100 * accuracy:.1f} % on held-out digits 0-4."
        )
        rows += job.compare()
    notes.append(
        f"{len(digits.train)} training, {len(digits.validation)} validation, {len(digits.test)} test images of 5-9; "
        f"{settings.seeds} seed(s); learning rate of every method: best of {settings.trials}, a factor {SPACING:.2g} "
        "apart, on validation. All train the classifier too."
    )
    content = {
        "settings": asdict(settings) | {"k": k, "learning_rate_spacing": SPACING, "smoke": smoke},
        "images": digits.sizes(),
        "rows": [row.as_json() for row in rows],
        "notes": notes,
    }
    return "\n".join([table(rows), "", *notes]), content
