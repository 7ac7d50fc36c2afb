"""Data sets of `packages`, or a table of the Hub or of this machine: inputs with labels."""

from __future__ import annotations

import csv
import gzip
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .packages import MNIST, SENTIMENT, file_of


DOMAINS = {
    "movies": "movieReviewSnippets",
    "editorials": "nytEditorialSnippets",
    "tweets": "tweets",
    "products": "amazonReviewSnippets",
}
NEUTRAL = 0.5  # sentences with a mean rating this close to 0 are left out


@dataclass(frozen=True)
class Labelled:
    """Texts, or images as bytes `[count, channels, height, width]`, with classes counted from 0."""

    inputs: list[str] | Tensor
    labels: Tensor

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1


def ratings(domain: str) -> dict[str, float]:
    """Sentences of a domain with their mean rating by twenty people, from −4 to 4 (Hutto and Gilbert, ICWSM 2014)."""
    member = f"hutto_ICWSM_2014/{DOMAINS[domain]}_GroundTruth.txt"
    with tarfile.open(file_of(SENTIMENT)) as archive:
        content: Any = archive.extractfile(member)
        lines = content.read().decode().split("\n")
    rows = (line.split("\t", 2) for line in lines if line.strip())
    return {text: float(rating) for _, rating, text in rows}  # of a sentence that occurs twice, the last


def sentiment(domain: str) -> Labelled:
    """Is a sentence positive (1) or negative (0)? One of `DOMAINS`, without neutral sentences and repetitions."""
    rated = {text: rating for text, rating in ratings(domain).items() if abs(rating) > NEUTRAL}
    return Labelled(list(rated), torch.tensor([int(rating > 0) for rating in rated.values()]))


def mnist() -> Labelled:
    """5,000 digits of MNIST, 500 of each, 28 × 28."""
    with gzip.open(file_of(MNIST), "rt") as file:
        table = torch.tensor([[int(float(cell)) for cell in row] for row in csv.reader(file)])
    return Labelled(table[:, :-1].to(torch.uint8).view(-1, 1, 28, 28), table[:, -1])


def digits() -> Labelled:
    """scikit-learn's 1,797 digits, 8 × 8."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    return Labelled(torch.as_tensor(raw.images * 15.9375).to(torch.uint8)[:, None], torch.as_tensor(raw.target))


def of_table(source: str, text_column: str = "text", label_column: str = "label") -> Labelled:
    """
    Texts of a data set of the Hub (its split `train`), or of a file: json, jsonl, csv or parquet.

    Raises:
        `ValueError`: if a column is not there.
    """
    from datasets import load_dataset

    builder = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}.get(Path(source).suffix)
    table = load_dataset(builder, data_files=source, split="train") if builder else load_dataset(source, split="train")
    for column in (text_column, label_column):
        if column not in table.column_names:
            raise ValueError(f"{source} has no column {column!r}, only {', '.join(table.column_names)}")
    names = sorted(set(table[label_column]))
    return Labelled(list(table[text_column]), torch.tensor([names.index(label) for label in table[label_column]]))


def load(source: str) -> Labelled:
    """One of `DOMAINS`, `"mnist"`, `"digits"`, or `SOURCE[:TEXT_COLUMN:LABEL_COLUMN]` of a table."""
    if source in DOMAINS:
        return sentiment(source)
    if source in ("mnist", "digits"):
        return {"mnist": mnist, "digits": digits}[source]()
    return of_table(*source.split(":"))
