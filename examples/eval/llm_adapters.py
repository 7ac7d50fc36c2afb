"""LLM-Adapters' commonsense and arithmetic test sets for lm_eval: data, prompts and the answers' extraction.

The rules are those of the published `commonsense_evaluate.py` and `evaluate.py` (Hu et al., "LLM-Adapters: An Adapter
Family for Parameter-Efficient Fine-Tuning of Large Language Models"); README.md lists them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from datasets import Dataset


# What a data set's answers look like. A row's own answer tells which of them it is.
CHOICES = ("true|false", "solution[12]", "answer[1-5]", "ending[1-4]", "option[12]")
TOLERANCE = 1e-3
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def load(name: str, data: str | None = None, **_: Any) -> dict[str, Dataset]:
    """
    The test split of a data set, from a file of rows with `instruction`, `input`, `output` and `answer`.

    Args:
        name: of the data set, such as `arc_easy`.
        data: the folder that holds the data sets' folders, `arc_easy/test.jsonl` or `ARC-Easy/test.json`.
    """
    if not data:
        raise ValueError(f'{name} needs its data: pass --data FOLDER, or to lm_eval --metadata \'{{"data": "…"}}\'.')
    folders = [path for path in Path(data).iterdir() if _plain(path.name) == _plain(name)]
    files = [folder / file for folder in folders for file in ("test.jsonl", "test.json") if (folder / file).is_file()]
    if not files:
        raise ValueError(f"data={data!r} has no {name}/test.jsonl.")
    text = files[0].read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    columns = ("instruction", "input", "answer")
    return {"test": Dataset.from_list([{column: str(row.get(column, "")) for column in columns} for row in rows])}


def _plain(name: str) -> str:
    return re.sub(r"[-_]", "", name.lower())


def prompt(row: dict[str, str]) -> str:
    """What the model is asked, as the recipes in `examples/recipes` train it."""
    return (PROMPT_WITH_INPUT if row["input"] else PROMPT).format(**row)


def choice(row: dict[str, str], results: list[str]) -> dict[str, float]:
    """Right if the first choice that the response names, such as `answer2`, is the row's."""
    form = next((form for form in CHOICES if re.fullmatch(form, row["answer"])), None)
    if form is None:
        raise ValueError(f"answer={row['answer']!r} is none of {', '.join(CHOICES)}.")
    named = re.search(form, results[0])
    return {"acc": float(named is not None and named[0] == row["answer"])}


def number(row: dict[str, str], results: list[str]) -> dict[str, float]:
    """Right if the response's last number is the row's, to 0.001. Commas are left out before."""
    numbers = re.findall(r"-?\d+\.?\d*", results[0].replace(",", ""))
    answer = float(row["answer"].replace(",", ""))
    return {"acc": float(bool(numbers) and abs(float(numbers[-1]) - answer) <= TOLERANCE)}


def letter(row: dict[str, str], results: list[str]) -> dict[str, float]:
    """Right if the response's first capital letter from A to E is the row's."""
    named = re.search("[A-E]", results[0])
    return {"acc": float(named is not None and named[0] == row["answer"])}
