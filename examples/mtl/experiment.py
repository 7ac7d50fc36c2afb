"""
Gradient conflicts and task drop of methods × trained weights on the computed problems, over paired seeds.

    python examples/mtl/experiment.py --bench digits --methods joint pcgrad --seeds 0 1 2 --out out/digits
    python examples/mtl/experiment.py --bench digits --out out/digits --table      # only print what is there

Every cell is trained with every learning rate, on the same data and from the same weights per seed; the rate is chosen
by Δm on validation data, averaged over the seeds, and the table shows test data. Δm is relative to single-task
training of all weights, with the same search. Finished trainings are kept in `runs.jsonl`: an interrupted experiment
goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from _benches import BENCHES
from _benches.base import Bench
from _benches.runs import MASKS, Run, train
from tqdm import tqdm

from peft_ext.mtl import relative_task_drop


METHODS = ["joint", "pcgrad", "cagrad", "mgda", "imtl_g", "nash_mtl", "famo"]
RATES = [1e-3, 2.5e-4]
KEYS = ("bench", "method", "mask", "learning_rate", "seed", "density", "task", "epochs")


def key_of(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run[name] for name in KEYS)


def planned(args: argparse.Namespace) -> list[Run]:
    """Single tasks, then every method with every mask; all rates and seeds."""
    bench = BENCHES[args.bench]
    cells = [("joint", "full", task) for task in bench.tasks]
    cells += [(method, mask, None) for method in args.methods for mask in args.masks]
    return [
        Run(args.bench, method, mask, rate, seed, args.density, task, args.epochs)
        for seed in args.seeds
        for method, mask, task in cells
        for rate in args.rates
    ]


def read(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    if not path.exists():
        return {}
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    return {key_of(run): run for run in runs}


def single_task(bench: Bench, runs: list[dict[str, Any]], split: str) -> dict[int, dict[str, dict[str, float]]]:
    """Per seed the metrics of single-task training, each task with its best rate on validation data."""
    chosen: dict[int, dict[str, dict[str, float]]] = {}
    for task in bench.tasks:
        own = [run for run in runs if run["task"] == task]
        rates = sorted({run["learning_rate"] for run in own})
        first = {run["seed"]: run for run in own if run["learning_rate"] == rates[0]}

        def drop(run: dict[str, Any], first: dict[int, Any] = first) -> float:
            baseline = first[run["seed"]]["validation"]
            return relative_task_drop(run["validation"], baseline, bench.higher_is_better)

        best = min(rates, key=lambda rate: np.mean([drop(run) for run in own if run["learning_rate"] == rate]))
        for run in own:
            if run["learning_rate"] == best:
                chosen.setdefault(run["seed"], {})[task] = run[split][task]
    return chosen


def table(bench: Bench, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method and mask."""
    baseline = {split: single_task(bench, runs, split) for split in ("validation", "test")}
    rows = []
    joint = [run for run in runs if run["task"] is None]
    for method, mask in sorted({(run["method"], run["mask"]) for run in joint}):
        cell = [run for run in joint if (run["method"], run["mask"]) == (method, mask)]

        def drop(run: dict[str, Any], split: str) -> float:
            return relative_task_drop(run[split], baseline[split][run["seed"]], bench.higher_is_better)

        rates = sorted({run["learning_rate"] for run in cell})
        best = min(
            rates, key=lambda r: np.mean([drop(run, "validation") for run in cell if run["learning_rate"] == r])
        )
        chosen = sorted((run for run in cell if run["learning_rate"] == best), key=lambda run: run["seed"])
        row: dict[str, Any] = {
            "method": method,
            "mask": mask,
            "learning_rate": best,
            "seeds": [r["seed"] for r in chosen],
        }
        row["task_drop"] = [drop(run, "test") for run in chosen]
        for name in ("incidence_all", "incidence_last_half", "noise_floor"):
            row[name] = [run.get(f"gradient_conflict_{name}", float("nan")) for run in chosen]
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    def spread(values: list[float]) -> str:
        sd = np.std(values, ddof=1) if len(values) > 1 else float("nan")
        return f"{np.mean(values):6.1f} ±{sd:4.1f}"

    print(f"{'method':10}{'mask':8}{'rate':>8}{'p % all':>15}{'p % last half':>15}{'noise floor':>15}{'Δm %':>15}")
    for row in rows:
        columns = [spread(row[key]) for key in ("incidence_all", "incidence_last_half", "noise_floor", "task_drop")]
        print(f"{row['method']:10}{row['mask']:8}{row['learning_rate']:8.0e}" + "".join(f"{c:>15}" for c in columns))
    by_cell = {(row["method"], row["mask"]): row for row in rows}
    print("\nPaired differences to all weights, seed by seed: p % all, p % last half, Δm %")
    for (method, mask), row in by_cell.items():
        full = by_cell.get((method, "full"))
        if mask == "full" or full is None or full["seeds"] != row["seeds"]:
            continue
        keys = ("incidence_all", "incidence_last_half", "task_drop")
        parts = [[a - b for a, b in zip(row[key], full[key], strict=True)] for key in keys]
        print(f"{method:10}{mask:8}" + "   ".join(" ".join(f"{d:+6.1f}" for d in part) for part in parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", choices=sorted(BENCHES), default="digits")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="learning rates to search")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--epochs", type=int, help="if not the problem's own")
    parser.add_argument("--out", type=Path, default=Path("mtl_experiment"))
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "runs.jsonl"
    done = read(path)
    if not args.table:
        for run in tqdm(planned(args), desc=args.bench):
            if tuple(getattr(run, name) for name in KEYS) in done:
                continue
            result = train(BENCHES[args.bench], run)
            with path.open("a") as file:
                file.write(json.dumps(result) + "\n")
    runs = [run for run in read(path).values() if run["bench"] == args.bench]
    rows = table(BENCHES[args.bench], runs)
    (args.out / "table.json").write_text(json.dumps(rows, indent=1))
    show(rows)


if __name__ == "__main__":
    main()
