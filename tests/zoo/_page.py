"""The tables of results in `docs/compatibility.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import peft
import torch
import transformers
import trl


CELL = "compatibility"  # name of the property in which a test reports (table, row, column, outcome)
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
COLUMNS = ("NeuroAda", "GPS", "PSN", "MoReS")

INTRODUCTION = """# Compatibility

`make test-zoo` runs a test per cell of these tables and writes this page from those that ran, here with peft
{peft}, transformers {transformers}, trl {trl} and torch {torch} on a CPU. "refused" means an error before anything
is changed. [What is not supported](limits.md) has the reasons and what to do instead.

In short, how many rows of each table work:
"""
VERBS = """The last table has [architectures](#architectures).

## What you do with an adapter

On a tiny Llama. MoReS steers the first and last tokens here. "works" means that the outcome was checked: what is
loaded computes the same bits, unmerging restores every bit, what is disabled is the base model bit for bit, and what
is merged, exported, compiled or mixed computes the same within 1e-4.
"""
TRAINERS = """## Trainers

"works" means that in three steps every trained tensor of the adapter changed, no frozen one did, and what the trainer
saved loads to the same bits.
"""
QUANTISATIONS = """## Quantised bases

Those that compute on a CPU. "trains": every trained tensor gets a gradient. "loads": what is saved loads onto the
quantised base to the same bits. "merges": merged layers are dense, within 1e-4 of the largest output (8-bit layers of
bitsandbytes round their inputs too, and dense ones don't: within 5 %), and unmerging restores every bit. GPS's scores
come from the model before it is quantised: [how](methods/gps.md#trainers-and-quantised-bases).
"""
NOT_TRIED = """Not tried, since they need a GPU or a package without a CPU build: AWQ, GPTQ, AQLM, EETQ, HQQ, and
transformers' kernels of FP8 and MXFP4. [What is not supported](limits.md) says what is refused by name.
"""
ARCHITECTURES = """## Architectures

What the default targets do on {count} architectures. NeuroAda takes linear layers and fused experts; PSN takes
convolutions too. GPS takes the layers that PSN takes.

"works" means that on a tiny model with random weights

- a new adapter changes nothing, and every value gets a gradient;
- a step of AdamW with weight decay changes the values and nothing else;
- the merged model gives what the adapted one gave, within 1e-4 of the largest output, in a forward pass and, for
  decoders, in generation;
- merging writes at the chosen entries only, and unmerging restores every bit.

The last column names layers that are left out, and refused by name:

- read: the model reads their weight without calling them, always or on some paths, where an adapter is not computed;
- parametrised: a parametrization computes their weight, so nothing could be merged into it;
- fused: experts that transformers keeps in one parameter, in a class that does not use its experts' interface.
"""

SHORT = {
    "verbs": "[what you do with an adapter](#what-you-do-with-an-adapter)",
    "trainers": "[trainers](#trainers)",
    "quantisations": "[quantised bases](#quantised-bases)",
}

Cells = Mapping[tuple[str, str, str], str]  # outcome by table, row and column


def table(cells: Cells, name: str, rows: Sequence[str], columns: Sequence[str], corner: str) -> list[str]:
    """Lines of a table; cells without a test say so."""
    lines = [f"| {corner} | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    for row in rows:
        found = [cells.get((name, row, column), "not tried") for column in columns]
        lines.append(f"| {row} | {' | '.join(found)} |")
    return [*lines, ""]


def summary(cells: Cells) -> dict[tuple[str, str, str], str]:
    """Cells of the table that counts what works and what is refused, by method."""
    counted = {}
    for name, row in SHORT.items():
        for column in COLUMNS:
            outcomes = [
                outcome for (table_of, _, method), outcome in cells.items() if (table_of, method) == (name, column)
            ]
            refused = sum(outcome.startswith("refused") for outcome in outcomes)
            works = f"{len(outcomes) - refused} work"
            counted["short", row, column] = f"{works}, {refused} are refused" if refused else works
    return counted


def write(cells: Cells, idle: Sequence[str]) -> None:
    """
    Write the page.

    Args:
        cells: what the tests reported.
        idle: layers of architectures that get no gradient, one line each.
    """
    rows = {
        name: list(dict.fromkeys(row for table_of, row, _ in cells if table_of == name))
        for name in ("verbs", "trainers", "quantisations", "architectures")
    }
    versions = {module.__name__: module.__version__.partition("+")[0] for module in (peft, transformers, trl, torch)}
    parts = [
        INTRODUCTION.format(**versions),
        *table(summary(cells), "short", list(SHORT.values()), COLUMNS, ""),
        VERBS,
        *table(cells, "verbs", rows["verbs"], COLUMNS, "Verb"),
        TRAINERS,
        *table(cells, "trainers", rows["trainers"], COLUMNS, "Trainer"),
        QUANTISATIONS,
        *table(cells, "quantisations", rows["quantisations"], COLUMNS, "Quantisation"),
        NOT_TRIED,
        ARCHITECTURES.format(count=len(rows["architectures"])),
        *table(cells, "architectures", rows["architectures"], ("Kind", "NeuroAda", "PSN", "Left out"), "Architecture"),
        "Layers to which these models give no gradient:",
        "",
        *idle,
    ]
    PAGE.write_text("\n".join(parts) + "\n")
