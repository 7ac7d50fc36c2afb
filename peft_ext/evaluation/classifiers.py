"""Sequence classifiers: GLUE."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from .glue import Glue


# Per task, its columns of text and the number of classes; 1 is a regression.
TASKS = {
    "cola": (("sentence",), 2),
    "sst2": (("sentence",), 2),
    "mrpc": (("sentence1", "sentence2"), 2),
    "stsb": (("sentence1", "sentence2"), 1),
    "qqp": (("question1", "question2"), 2),
    "mnli": (("premise", "hypothesis"), 3),
    "mnli_mismatched": (("premise", "hypothesis"), 3),
    "qnli": (("question", "sentence"), 2),
    "rte": (("sentence1", "sentence2"), 2),
    "wnli": (("sentence1", "sentence2"), 2),
}
_SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def evaluate_adapters(base: str, options: Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """
    Per adapter and task, GLUE's metrics on the validation split; `options` are those of `peft-ext eval`.

    Raises `ValueError` if a task is not one of GLUE or its data are missing, before a model is loaded.
    """
    unknown = [task for task in options.tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"--tasks {' '.join(unknown)}: a classifier is evaluated on {', '.join(TASKS)}.")
    if options.before:
        raise ValueError("--before: the base has no trained head to classify with; leave it out.")
    data = {task: _data(task, options.data) for task in options.tasks}
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for adapter in options.adapters:
        results[adapter] = {}
        for task, rows in data.items():
            model = AutoModelForSequenceClassification.from_pretrained(
                base, num_labels=TASKS[task][1], dtype=options.dtype
            )
            model = PeftModel.from_pretrained(model, adapter).to(options.device).eval()
            source = adapter if (Path(adapter) / "tokenizer_config.json").is_file() else base
            tokenizer = AutoTokenizer.from_pretrained(source)
            if options.limit is not None:
                rows = rows.select(range(min(options.limit, len(rows))))
            predictions = predict(model, tokenizer, rows, TASKS[task][0], options.batch_size)
            metric = Glue(config_name=task)
            results[adapter][task] = metric.compute(predictions=predictions, references=rows["label"])
    return results


@torch.no_grad()
def predict(model: Any, tokenizer: Any, rows: Dataset, columns: tuple[str, ...], batch_size: int) -> list[Any]:
    """A class per row, or a number where the model has one output."""
    predictions: list[Any] = []
    for start in tqdm(range(0, len(rows), batch_size), desc="classify"):
        batch = rows[start : start + batch_size]
        inputs = tokenizer(*(batch[column] for column in columns), truncation=True, padding=True, return_tensors="pt")
        logits = model(**inputs.to(model.device)).logits  # [batch, classes]
        predictions += (logits.argmax(-1) if logits.shape[-1] > 1 else logits[:, 0].float()).tolist()
    return predictions


def _data(task: str, folder: str | None) -> Dataset:
    """The validation split, from `<folder>/<task>/validation.jsonl` (or .csv, .parquet) or from the Hub."""
    if folder is None:
        split = {"mnli": "validation_matched", "mnli_mismatched": "validation_mismatched"}.get(task, "validation")
        try:
            return load_dataset("nyu-mll/glue", task.partition("_")[0], split=split)
        except OSError as error:
            raise ValueError(f"GLUE's {task} can't be loaded from the Hub ({error}); pass --data FOLDER.") from error
    for suffix, builder in _SUFFIXES.items():
        path = Path(folder) / task / f"validation{suffix}"
        if path.is_file():
            rows = load_dataset(builder, data_files=str(path), split="train")
            missing = {*TASKS[task][0], "label"} - set(rows.column_names)
            if missing:
                raise ValueError(f"{path} has no column {', '.join(sorted(missing))}.")
            return rows
    raise ValueError(f"--data {folder} has no {task}/validation.jsonl (nor .csv, .parquet).")
