"""Predictions kept as files, accuracy, and McNemar's test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.files import JsonFile
from ..data.samples import Sample


def correct(samples: Sequence[Sample], predicted: Sequence[int]) -> dict[str, bool]:
    """Whether each expression's target was found. A target that is no candidate counts as missed."""
    return {sample.name: sample.label == own for sample, own in zip(samples, predicted, strict=True)}


def accuracy(right: Mapping[str, bool]) -> float:
    return sum(right.values()) / len(right)


def save(path: str | Path, right: Mapping[str, bool]) -> None:
    Path(path).write_text(json.dumps(dict(right), indent=1) + "\n")


def load(path: str | Path) -> dict[str, bool]:
    file = JsonFile(path, dict)
    for name, value in file.content.items():
        if not isinstance(value, bool):
            raise file.error("must be true or false", name)
    return file.content


@dataclass(frozen=True)
class McNemar:
    """
    McNemar's exact test (appendix A.8): do two models that saw the same samples err equally often?

    Args:
        first_only, second_only (`int`): samples that the first, or the second model alone got right.
        p_value (`float`): two-sided, of a binomial distribution over the samples that they differ on.
    """

    first_only: int
    second_only: int
    p_value: float


def mcnemar(first: Mapping[str, bool], second: Mapping[str, bool]) -> McNemar:
    from scipy.stats import binomtest

    if first.keys() != second.keys():
        differing = sorted(first.keys() ^ second.keys())
        raise ValueError(
            f"the two models were tested on different samples: {len(differing)}, such as {differing[0]!r}."
        )
    first_only = sum(first[name] and not second[name] for name in first)
    second_only = sum(second[name] and not first[name] for name in first)
    differ = first_only + second_only
    return McNemar(first_only, second_only, float(binomtest(first_only, differ).pvalue) if differ else 1.0)
