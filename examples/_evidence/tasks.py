"""The four domains as four tasks of one encoder: gradient conflicts, and what sparse training changes."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from _benches.base import Bench, Table, classification_losses, outputs_of
from _benches.runs import MASKS, Run
from _benches.runs import train as train_tasks
from _experiment.plan import Cell, Ledger, Plan
from _experiment.report import MASKS as MASKED
from _experiment.report import NAMES
from _experiment.results import choose_rates, differences_of, rows_of, summaries_of
from _quickstart.search import SPACING
from experiment import settings_of
from torch import Tensor, nn

from . import problems
from .experiments import TasksSize
from .problems import Classifier, Part
from .runs import SEARCH_SEED, evaluated_part
from .stand_ins import PREFIX
from .tables import table


DOMAINS = ("movies", "editorials", "tweets", "products")
VALIDATION, TEST = 150, 300
MAX_TOKENS = 24  # four sentences a row: shorter ones than in the other experiments
HEAD_SPEED = 10.0  # the trainer has one learning rate: larger features let the new heads learn faster than the encoder
NOISE_FLOOR_STEPS = 10
DENSITY = 0.3
DIVERGED = 1e9  # the loss of a run without a finite one
BATCH_SIZE = 8  # rows: as many sentences of every domain


class DomainTasks(nn.Module):
    """
    One encoder and a head per domain. A row has a sentence of every domain, and each goes through the encoder apart,
    so that the backward pass of a task is only about its own sentences.
    """

    def __init__(self, base: Classifier, tasks: Sequence[str], seed: int) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(base.encoder)
        self.pooling = base.pooling
        self.register_buffer("scale", HEAD_SPEED * base.scale)
        self.tasks = tuple(tasks)
        heads = {}
        for task in tasks:
            part = copy.deepcopy(base)
            part.reset_head(100 * seed + DOMAINS.index(task))
            heads[task] = part.head
        self.heads = nn.ModuleDict(heads)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Both are `[rows, tasks, tokens]`, padded at the end."""
        outputs = {}
        for number, task in enumerate(self.tasks):
            mask = attention_mask[:, number]
            mask = mask[:, : int(mask.sum(1).max())]
            ids = input_ids[:, number, : mask.shape[1]]
            hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            outputs[task] = self.heads[task](self.scale * self.pooling(hidden, mask))
        return outputs


@lru_cache(maxsize=1 + len(DOMAINS))
def tables(model: str, images: int, tasks: tuple[str, ...] = DOMAINS) -> tuple[Table, Table, Table]:
    """Training, validation and test rows, the same sentences of a task whatever the others are."""
    prefix = PREFIX if model.startswith(PREFIX) else ""
    found = [problems.load(model, f"{prefix}{domain}") for domain in DOMAINS]
    sizes = {"train": images, "validation": min(VALIDATION, images), "test": min(TEST, images)}
    train, validation, test = (
        _table([getattr(one, part) for one in found], size, tasks, by_length=part != "train")
        for part, size in sizes.items()
    )
    return train, validation, test


def _table(parts: Sequence[Part], size: int, tasks: Sequence[str], by_length: bool) -> Table:
    """
    As many rows as asked for and all domains have, of their first sentences that are short enough; `by_length`: each
    task's shortest ones first, so that batches are not padded much.
    """
    columns: dict[str, Tensor] = {}
    chosen = [[row for row in range(len(part)) if part.lengths[row] <= MAX_TOKENS][:size] for part in parts]
    rows = min(map(len, chosen))
    shape = (rows, len(tasks), MAX_TOKENS)
    ids, masks = torch.full(shape, parts[0].padding), torch.zeros(shape, dtype=torch.long)
    for number, task in enumerate(tasks):
        domain = DOMAINS.index(task)
        part, which = parts[domain], chosen[domain][:rows]
        if by_length:
            which = sorted(which, key=part.lengths.__getitem__)
        batch = part.batch(which)
        length = batch["input_ids"].shape[1]
        ids[:, number, :length], masks[:, number, :length] = batch["input_ids"], batch["attention_mask"]
        columns[f"labels_{task}"] = batch["labels"]
    return Table({"input_ids": ids, "attention_mask": masks, **columns})


def evaluate(model: nn.Module, data: Table) -> dict[str, dict[str, float]]:
    """Accuracy in percent and cross-entropy of every task."""
    result = {}
    for task, logits in outputs_of(model, data, 64).items():
        labels = data.columns[f"labels_{task}"]
        accuracy = (logits.argmax(1) == labels).double().mean()
        result[task] = {"top1": 100 * float(accuracy), "loss": float(nn.functional.cross_entropy(logits, labels))}
    return result


def bench(model: str, rows: int, tasks: tuple[str, ...] = DOMAINS) -> Bench:
    """The problem, for one pretrained encoder."""
    return Bench(
        name=model,
        tasks=list(tasks),
        make_data=lambda seed: tables(model, rows, tasks),
        make_model=lambda seed: DomainTasks(problems.load(model, data_name(model)).base, tasks, seed),
        losses=classification_losses,
        evaluate=evaluate,
        higher_is_better={"top1": True},
        epochs=1,
        batch_size=BATCH_SIZE,
    )


def data_name(model: str) -> str:
    return f"{PREFIX if model.startswith(PREFIX) else ''}{DOMAINS[0]}"


def execute(run: Run) -> dict[str, Any]:
    """
    Train one cell; a record of the kind that `examples/mtl/experiment.py` keeps. The search looks at validation rows
    alone, and the others at test rows and, of several tasks, at the noise floor.
    """
    begin = time.process_time()
    assert run.images is not None
    part = evaluated_part(run.seed)
    problem = bench(run.bench, run.images, (run.task,) if run.task else DOMAINS)
    measured = part == "test" and run.task is None
    record = train_tasks(problem, run, parts=[part], noise_floor_steps=NOISE_FLOOR_STEPS if measured else 0)
    losses = {part: {task: values.pop("loss") for task, values in record[part].items()}}
    return {**record, "losses": losses, "cpu_seconds": round(time.process_time() - begin, 2)}


def plan(size: TasksSize) -> Plan:
    """Methods × masks, and every task alone."""
    lists = (list(values) for values in (size.methods, MASKS, size.rates, size.seeds))
    problem = bench(size.model, size.rows)
    return Plan(problem, *lists, SEARCH_SEED, DENSITY, problem.epochs, size.rows, problem.epochs)


def conduct(plan: Plan, widenings: int, ledger: Ledger, train: Callable[[Sequence[Run]], None]) -> dict[Cell, float]:
    """Search with widening at the edges, then the seeds; every cell's learning rate."""
    runs = plan.search()
    train(runs)
    for _ in range(widenings):
        chosen = _best_rates(plan, ledger, runs)
        wider = [plan.trial(cell, rate) for cell, best in chosen.items() if (rate := _beyond(cell, best, runs))]
        if not wider:
            break
        train(wider)
        runs += wider
    chosen = _best_rates(plan, ledger, runs)
    train(plan.final(chosen))
    return chosen


def _best_rates(plan: Plan, ledger: Ledger, runs: Sequence[Run]) -> dict[Cell, float]:
    """Per cell the rate of the lowest losses on validation rows, as the other experiments choose; Δm of losses."""
    losses = [
        {**record, "validation": _as_metrics(record["losses"]["validation"])}
        for record in map(ledger.__getitem__, runs)
    ]
    return choose_rates(replace(plan.bench, higher_is_better={"loss": False}), losses)


def _as_metrics(losses: dict[str, float]) -> dict[str, dict[str, float]]:
    return {task: {"loss": loss if math.isfinite(loss) else DIVERGED} for task, loss in losses.items()}


def _beyond(cell: Cell, best: float, runs: Sequence[Run]) -> float | None:
    """The rate next to the best one outside those that the cell was trained with."""
    tried = [run.learning_rate for run in runs if (run.method, run.mask, run.task) == cell]
    if best not in (min(tried), max(tried)):
        return None
    return float(f"{best * (SPACING if best == max(tried) else 1 / SPACING):.2g}")


def report(plan: Plan, ledger: Ledger, chosen: dict[Cell, float]) -> dict[str, Any]:
    """Rows, paired differences and their summaries, as `_experiment.report.markdown` shows them."""
    final = [ledger[run] for run in plan.final(chosen)]
    rows = rows_of(plan.bench, final)
    differences = differences_of(rows)
    trained = [*final, *(ledger[run] for run in plan.search())]
    return {
        "benches": {plan.bench.name: settings_of(plan, trained)},
        "rows": rows,
        "differences": differences,
        "summaries": summaries_of(differences),
        "runs": final,
    }


def loss_table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Test cross-entropy of every task, ± over seeds; a task that is trained alone has a table's row of its own."""
    by_cell: dict[tuple[str, str], list[dict[str, float]]] = {}
    for run in runs:
        name = "alone" if run["task"] else NAMES[run["method"]]
        by_cell.setdefault((name, MASKED[run["mask"]]), []).append(run["losses"]["test"])
    lines = []
    for (name, mask), losses in by_cell.items():
        values = [[one[task] for one in losses if task in one] for task in DOMAINS]
        lines.append(
            [f"{name}, {mask}", *(f"{np.mean(column):.3f} ± {np.std(column, ddof=1):.3f}" for column in values)]
        )
    return ["", "Test loss of every task:", "", *table(["method, mask", *DOMAINS], lines), ""]
