"""The experiment as a table in Markdown and as figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .results import MEASURES, Record


NAMES = {
    "joint": "joint",
    "pcgrad": "PCGrad",
    "cagrad": "CAGrad",
    "graddrop": "GradDrop",
    "mgda": "MGDA",
    "imtl_g": "IMTL-G",
    "nash_mtl": "Nash-MTL",
    "famo": "FAMO",
}
MASKS = {"full": "all weights", "psn": "PSN", "random": "random"}
COLORS = {"full": "C0", "psn": "C1", "random": "C2"}


def spread(values: list[Any], sign: bool = False) -> str:
    """Mean ± standard deviation over seeds."""
    if not values or None in values:
        return "–"
    mean = f"{np.mean(values):{'+' if sign else ''}.1f}"
    return f"{mean} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else mean


def counted(values: list[float]) -> str:
    """The same of a difference, with the number of seeds in which it is negative."""
    return f"{spread(values, sign=True)} ({sum(value < 0 for value in values)}/{len(values)})"


def _table(head: list[str], lines: list[list[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *lines)]


def markdown(report: dict[str, Any]) -> str:
    """`report` as `experiment.py` writes it to its JSON."""
    text = [
        "# Gradient conflicts and task drop: methods × trained weights",
        "",
        f"Made by `{report['command']}` ({report['cpu_minutes']:.0f} minutes of one core, {report['hardware']}, torch "
        f"{report['torch']}). p %: share of pairs of tasks with gradients more than 90° apart, over all steps and "
        "over the last half; floor: the same between two halves of one task's batch. Δm %: mean relative drop on "
        "test data against single-task training of all weights with the same budget and seed; lower is better. "
        "Mean ± standard deviation over seeds.",
        "",
        *body(report),
    ]
    return "\n".join(text) + "\n"


def body(report: dict[str, Any]) -> list[str]:
    """The tables of `report`'s `summaries`, `benches`, `rows` and `differences`."""
    text = [
        "## Over all methods",
        "",
        "Sparse minus all weights, with the same seed, data and order of samples: mean over methods, ± over seeds; in "
        "brackets in how many of the runs it is lower.",
        "",
    ]
    head = ["problem, mask", "p % all", "p % last half", "Δm %"]
    lines = []
    for summary in report["summaries"]:
        runs = summary["methods"] * len(summary["seeds"])
        cells = [f"{spread(summary[name], sign=True)} ({summary[f'{name}_lower']}/{runs})" for name in MEASURES]
        lines.append([f"{summary['bench']}, {MASKS[summary['mask']]}", *cells])
    text += _table(head, lines)
    for bench, settings in report["benches"].items():
        text += ["", f"## {bench}", "", _description(settings), ""]
        rows = [row for row in report["rows"] if row["bench"] == bench]
        head = ["method, mask", "rate", "p % all", "p % last half", "floor %", "Δm %"]
        keys = ("incidence_all", "incidence_last_half", "noise_floor", "task_drop")
        lines = [
            [
                f"{NAMES[row['method']]}, {MASKS[row['mask']]}",
                f"{row['learning_rate']:g}",
                *(spread(row[key]) for key in keys),
            ]
            for row in rows
        ]
        text += _table(head, lines)
        text += ["", "Paired differences to all weights (in brackets: seeds in which it is lower):", ""]
        head = ["method, mask", "p % all", "p % last half", "Δm %"]
        lines = [
            [f"{NAMES[one['method']]}, {MASKS[one['mask']]}", *(counted(one[name]) for name in MEASURES)]
            for one in report["differences"]
            if one["bench"] == bench
        ]
        text += _table(head, lines)
    return text


def _description(settings: Record) -> str:
    rates = ", ".join(f"{rate:g}" for rate in settings["rates"])
    return (
        f"T = {len(settings['tasks'])} ({', '.join(settings['tasks'])}); {settings['images']} training samples, "
        f"{settings['epochs']} epochs of batches of {settings['batch_size']}, Adam; sparse masks train "
        f"{100 * settings['density']:.0f} % of each neuron's inputs in the encoder, and the heads whole. Learning "
        f"rate: the best of {rates} on validation data of seed {settings['search_seed']}, for every method and mask "
        f"and every single task ({settings['search_epochs']} epochs); the table is of the seeds "
        f"{', '.join(map(str, settings['seeds']))}."
    )


def draw(report: dict[str, Any], path: Path) -> None:
    """Per problem: incidence by epoch of joint training, then last-half incidence and Δm by method; data beside."""
    from matplotlib.figure import Figure

    benches = list(report["benches"])
    figure = Figure(figsize=(5 * len(benches), 10), layout="constrained")
    grid = figure.subplots(3, len(benches), squeeze=False)
    data: dict[str, Any] = {}
    for column, bench in enumerate(benches):
        top, middle, bottom = grid[:, column]
        curves = _curves(report, bench)
        for mask, values in curves.items():
            array = np.array(values)  # [seeds, epochs]
            epochs = np.arange(1, array.shape[1] + 1)
            mean, sd = array.mean(axis=0), array.std(axis=0)
            top.plot(epochs, mean, color=COLORS[mask], label=MASKS[mask])
            top.fill_between(epochs, mean - sd, mean + sd, color=COLORS[mask], alpha=0.2)
        top.set(title=bench, xlabel="epoch", ylabel="conflicts, % of pairs (joint)")
        top.legend()
        rows = [row for row in report["rows"] if row["bench"] == bench]
        methods = list(dict.fromkeys(row["method"] for row in rows))
        for axes, key, label in (
            (middle, "incidence_last_half", "conflicts, last half, %"),
            (bottom, "task_drop", "Δm, %"),
        ):
            for row in rows:
                place = methods.index(row["method"]) + 0.27 * (list(MASKS).index(row["mask"]) - 1)
                axes.bar(place, np.mean(row[key]), 0.25, color=COLORS[row["mask"]])
                axes.plot([place] * len(row[key]), row[key], ".", color="black", markersize=3)
            axes.set_xticks(range(len(methods)), [NAMES[m] for m in methods], rotation=30, ha="right")
            axes.set_ylabel(label)
        data[bench] = {"incidence_by_epoch_joint": curves, "bars": rows}
    figure.savefig(path, dpi=110)
    path.with_name(f"{path.stem}_figure.json").write_text(json.dumps(data, indent=1) + "\n")


def _curves(report: dict[str, Any], bench: str) -> dict[str, list[list[float]]]:
    """Incidence by epoch of joint training, per mask and seed."""
    curves: dict[str, list[list[float]]] = {}
    for run in report["runs"]:
        final = run["seed"] in report["benches"][bench]["seeds"]
        if run["bench"] == bench and run["method"] == "joint" and run["task"] is None and final:
            curves.setdefault(run["mask"], []).append(run["incidence_by_epoch"])
    return curves
