"""Results as JSON and as tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from _experiment.plan import Ledger
from _experiment.report import spread
from _quickstart.search import Search

from .protocol import Cell, Comparison
from .statistics import Difference, paired_difference
from .training import unpacked


def correct(comparison: Comparison, cell: Cell, rate: float, ledger: Ledger) -> list[np.ndarray]:
    """Per data set `[seeds, test samples]`, 1 where the prediction is right."""
    return [
        np.array(
            [
                unpacked(ledger[comparison.run(cell, data, rate, seed)]["test_result"]["correct"])
                for seed in comparison.seeds
            ]
        ).astype(int)
        for data in comparison.data
    ]


def rows(comparison: Comparison, searches: Mapping[Cell, Search], ledger: Ledger) -> list[dict[str, Any]]:
    """A row per method and number of training samples; differences are to the comparison's first method."""
    result = []
    for size in comparison.steps:
        reference = (comparison.methods[0], size)
        rates = {cell: comparison.rate(found) for cell, found in searches.items() if cell[1] == size}
        baseline = correct(comparison, reference, rates[reference], ledger)
        for cell, rate in rates.items():
            right = correct(comparison, cell, rate, ledger)
            record = ledger[comparison.run(cell, comparison.data[0], rate, comparison.seeds[0])]
            difference = None if cell == reference else paired_difference(right, baseline)
            accuracies = {data: (100 * one.mean(1)).tolist() for data, one in zip(comparison.data, right, strict=True)}
            result.append(
                {
                    "method": cell[0],
                    "size": size,
                    "adapter_parameters": record["adapter_parameters"],
                    "head_parameters": record["head_parameters"],
                    "learning_rate": rate,
                    "edge": searches[cell].edge,
                    "trials": [vars(trial) for trial in searches[cell].trials],
                    "accuracy": accuracies,
                    "mean": fmean(value for values in accuracies.values() for value in values),
                    "difference": None if difference is None else vars(difference) | {"verdict": difference.verdict},
                }
            )
    return result


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *lines)]


def comparison_table(
    comparison: Comparison, found: Sequence[Mapping[str, Any]], refused: Mapping[str, str]
) -> list[str]:
    """The rows of a comparison, one table per number of training samples, and why methods are missing."""
    text = [f"## {comparison.title}", ""]
    reference = comparison.methods[0]
    for size, steps in comparison.steps.items():
        text += [
            f"{comparison.model}, {size} training samples, {steps} steps of {comparison.batch_size}; test accuracy, "
            f"%, of {comparison.test} samples per data set, mean ± standard deviation over {len(comparison.seeds)} "
            f"seeds; differences to {reference} in points, with 95 % intervals, and data sets × seeds won.",
            "",
        ]
        head = ["method", "trained", "with head", "rate", *comparison.data, "mean", f"− {reference}", "won"]
        text += [*table(head, [_line(row, comparison) for row in found if row["size"] == size]), ""]
    if any(row["edge"] for row in found):
        text += ["\\* best learning rate at the edge of its grid even after widening", ""]
    text += [f"Not trained: {name} ({reason})" for name, reason in refused.items()]
    return text


def _line(row: Mapping[str, Any], comparison: Comparison) -> list[str]:
    interval, won = _difference(row["difference"]) if row["difference"] else ("", "")
    return [
        row["method"],
        f"{row['adapter_parameters']:,}",
        f"{row['adapter_parameters'] + row['head_parameters']:,}",
        f"{row['learning_rate']:g}{'*' if row['edge'] else ''}",
        *(spread(row["accuracy"][data]) for data in comparison.data),
        f"{row['mean']:.1f}",
        interval,
        won,
    ]


def _difference(found: Mapping[str, Any]) -> tuple[str, str]:
    """A `Difference` in points with its interval, and the pairs won."""
    mean, low, high = (100 * found[name] for name in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", f"{found['wins']}/{found['pairs']}"


def merging_table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Means over domains, ± over seeds."""
    forms = list(records[-1]["merged"])  # the peer has more
    head = ["adapters", "pretrained (probe)", "own adapter", "probe under another's adapter", *forms]
    lines = []
    for method in dict.fromkeys(record["method"] for record in records):
        chosen = [record for record in records if record["method"] == method]
        columns = [
            [fmean(record["pretrained"].values()) for record in chosen],
            [fmean(record["alone"].values()) for record in chosen],
            [fmean(value for others in record["others"].values() for value in others.values()) for record in chosen],
            *([fmean(r["merged"][form].values()) for r in chosen if form in r["merged"]] for form in forms),
        ]
        lines.append([method, *(spread([100 * value for value in column]) for column in columns)])
    title = "## Merging: one adapter per domain, then all in one"
    note = (
        "Test accuracy, %, mean over the domains ± standard deviation over seeds. The merged adapters use each "
        "domain's own head; their weight is chosen on validation, per form and method. LoRA's `linear` is the exact "
        "sum (PEFT's `cat`); `ties` and `dare_linear` prune its factors, with `_svd` its update, as they do ours."
    )
    return [title, "", note, "", *table(head, lines), "", *_merging_differences(records), ""]


def _merging_differences(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every method minus the last, which is the peer."""
    *names, peer = dict.fromkeys(record["method"] for record in records)

    def accuracies(method: str, form: str) -> list[np.ndarray]:
        chosen = [record for record in records if record["method"] == method]
        found = [record["alone"] if form == "own adapter" else record["merged"][form] for record in chosen]
        return [np.array([[one[data]] for one in found]) for data in chosen[0]["data"]]

    def minus_peer(method: str, form: str) -> Difference:
        return paired_difference(accuracies(method, form.removesuffix("_svd")), accuracies(peer, form))

    forms = ["own adapter", *records[-1]["merged"]]
    lines = [[name, *(" ".join(_difference(vars(minus_peer(name, form)))) for form in forms)] for name in names]
    note = f"Minus {peer}, in points, with 95 % intervals over seeds alone, and pairs of domain and seed won:"
    return [note, "", *table(["adapters", *forms], lines)]


def unmerging_table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Drift after each number of cycles."""
    lines = [
        [
            record["method"],
            str(one["cycles"]),
            f"{one['weights']:.3g}",
            f"{100 * one['changed']:.1f}",
            f"{one['features']:.3g}",
        ]
        for record in records
        for one in record["drift"]
    ]
    head = [
        "method",
        "cycles",
        "mean change of a weight / mean weight",
        "weights changed, %",
        "largest change of a feature / sd",
    ]
    note = "A base in bfloat16; after every training step the adapter is merged and unmerged."
    return ["## Merge and unmerge", "", note, "", *table(head, lines), ""]


def cost_table(costs: Mapping[str, Mapping[str, float]], reference: str) -> list[str]:
    """Time and memory of a step."""
    lines = [
        [name, f"{1000 * cost['seconds']:.0f}", f"{cost['ratio']:.2f}", f"{cost['peak_bytes'] / 2**20:.0f}"]
        for name, cost in costs.items()
    ]
    return ["## A training step", "", *table(["method", "ms", f"/ {reference}", "peak, MiB"], lines), ""]
