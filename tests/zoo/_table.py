"""The table of results in `docs/compatibility.md`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from peft_ext.sparse.bases.experts import bank_names
from peft_ext.sparse.choose.unsuitable import unsuitable_layers

from ._architectures import ARCHITECTURES
from ._factory import Architecture


PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
COLUMN = "zoo"
NO_LINEAR = 'refused: no linear layer; PSN, or `target_modules="all-neurons"`'
INTRODUCTION = """# Architectures

What the default targets do on {count} architectures of transformers {version}. NeuroAda takes linear layers and fused
experts; PSN and GPS take convolutions too. `make test-zoo` writes this page from the tests that ran.

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

| Architecture | Kind | NeuroAda | PSN | Left out |
|---|---|---|---|---|
"""


def left_out(model: nn.Module) -> str:
    """What default targets leave out of a model, by the ends of the names."""
    kinds: dict[str, set[str]] = {"read": set(), "parametrised": set(), "fused": set()}
    for name, reason in unsuitable_layers(model).items():
        if reason.owner != "MultiheadAttention":  # whose parts are adapted with it
            kinds["parametrised" if reason.owner is None else "read"].add(name.rpartition(".")[2])
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and re.search("expert", f"{name}.{key}") and key not in bank_names(module):
                kinds["fused"].add(key)
    return "; ".join(f"{kind}: {', '.join(f'`{n}`' for n in sorted(names))}" for kind, names in kinds.items() if names)


def write(results: Mapping[tuple[str, str], Any]) -> None:
    """
    Write the page.

    Args:
        results: by architecture and method, the outcome (`""`, or why it failed) and what is left out.
    """
    rows = []
    for name, architecture in ARCHITECTURES.items():
        cells = [_cell(architecture, method, results[name, method][0]) for method in ("NeuroAda", "PSN")]
        rows.append(f"| {name} | {architecture.kind} | {' | '.join(cells)} | {results[name, 'PSN'][1]} |")
    notes = [
        f"- {name}: `{architecture.idle}`, since {architecture.why}."
        for name, architecture in ARCHITECTURES.items()
        if architecture.why
    ]
    text = INTRODUCTION.format(count=len(ARCHITECTURES), version=transformers.__version__)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(
        "\n".join([text + rows[0], *rows[1:], "", "Layers to which these models give no gradient:", "", *notes, ""])
    )


def _cell(architecture: Architecture, method: str, failure: str) -> str:
    if failure:
        return f"fails: {failure}"
    return NO_LINEAR if method == "NeuroAda" and not architecture.linear else "works"
