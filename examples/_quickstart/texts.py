"""A column of text from the Hub or from this machine, split for training, validation and test."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk


BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
HELD_OUT = 0.1  # share of the examples, for validation and test each
HELD_OUT_LIMIT = 500  # evaluation would take longer than training on large sets otherwise
SPLIT_SEED = 0


@dataclass(frozen=True)
class Texts:
    """Disjoint parts with the text as their only column."""

    train: Dataset
    validation: Dataset
    test: Dataset

    def sizes(self) -> dict[str, int]:
        return {name: len(part) for name, part in vars(self).items()}


class UsageError(ValueError):
    """An option names what is not there."""


def _read(source: str, configuration: str | None, split: str) -> Dataset:
    path = Path(source)
    if path.is_dir() and any((path / marker).exists() for marker in ("state.json", "dataset_dict.json")):
        found = load_from_disk(source)
        if not isinstance(found, DatasetDict):
            return found  # saved without splits
        if split not in found:
            raise UsageError(f"--split {split} is not in {source}: it has {', '.join(found)}")
        return found[split]
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise UsageError(f"--dataset {source}: cannot read {path.suffix or 'it'}, only {', '.join(BUILDERS)}")
        return load_dataset(BUILDERS[path.suffix], data_files=source, split="train")
    return load_dataset(source, configuration, split=split)


def load(options: argparse.Namespace) -> Texts:
    """
    The texts that `--dataset`, `--dataset-config`, `--split`, `--text-column` and `--max-examples` name.

    Raises:
        [`UsageError`]: If the column, the split or the file type does not exist, or too few examples are there.
    """
    found = _read(options.dataset, options.dataset_config, options.split)
    column = options.text_column
    if column not in found.column_names:
        raise UsageError(
            f"--text-column {column} is not in {options.dataset}: choose one of {', '.join(found.column_names)}"
        )
    found = found.select_columns(column).filter(lambda example: bool((example[column] or "").strip()))
    found = found.shuffle(seed=SPLIT_SEED).select(range(min(len(found), options.max_examples)))
    held_out = min(HELD_OUT_LIMIT, round(HELD_OUT * len(found)))
    if held_out < 1:
        raise UsageError(f"--dataset {options.dataset}: {len(found)} non-empty examples are too few to hold any out")
    return Texts(
        train=found.select(range(2 * held_out, len(found))),
        validation=found.select(range(held_out)),
        test=found.select(range(held_out, 2 * held_out)),
    )
