"""
Gradient conflicts and task drop of methods × trained weights on the computed problems, over paired seeds.

    python examples/mtl/experiment.py --out out                     # an hour of one core
    python examples/mtl/experiment.py --out out --benches digits    # one problem; several may run side by side
    python examples/mtl/experiment.py --out out --report            # only tables and figures of what is there

Learning rates are searched equally: every method and mask, and every single task, is trained with every rate on a seed
of its own, and the rate with the lowest Δm on validation data is used on the other seeds, of which the table shows
test data. Δm is relative to single-task training of all weights with the same budget. Finished runs are kept in
`runs_<bench>.jsonl`: an interrupted experiment goes on. Writes `mtl_experiment.md`, `.json` (with every run) and
`.png`, whose data are in `mtl_experiment_figure.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from _benches import BENCHES
from _benches.runs import MASKS, train
from _experiment.plan import BUDGETS, METHODS, RATES, Ledger, Plan, settings_of
from _experiment.report import draw, markdown
from _experiment.results import choose_rates, differences_of, rows_of, summaries_of
from tqdm import tqdm


def plan_of(bench: str, args: argparse.Namespace) -> Plan:
    images, epochs = BUDGETS[bench]
    images, epochs = args.images or images, args.epochs or epochs
    return Plan(
        BENCHES[bench],
        args.methods,
        args.masks,
        args.rates,
        args.seeds,
        args.search_seed,
        args.density,
        epochs,
        images,
        args.search_epochs or epochs,
    )


def conduct(plan: Plan, ledger: Ledger) -> None:
    """Train what is not there yet: the search, then the chosen rates."""
    for stage in ("search", "final"):
        if stage == "search":
            runs = plan.search()
        else:
            found = [record for run in plan.search() if (record := ledger.find(run))]
            runs = plan.final(choose_rates(plan.bench, found))
        for run in tqdm(runs, desc=f"{plan.bench.name}, {stage}"):
            if ledger.find(run):
                continue
            start = time.process_time()
            record = train(plan.bench, run)
            ledger.add({**record, "cpu_seconds": round(time.process_time() - start, 2)})


def hardware() -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return name


def report_of(out: Path, command: str) -> dict[str, Any]:
    """Everything that the finished runs of the plans in `out` say."""
    benches, rows, runs = {}, [], []
    for name in BENCHES:
        saved = out / f"plan_{name}.json"
        if not saved.exists():
            continue
        plan = Plan(BENCHES[name], **json.loads(saved.read_text()))
        ledger = Ledger(out / f"runs_{name}.jsonl")
        found = [record for run in plan.search() if (record := ledger.find(run))]
        if len(found) < len(plan.search()):
            continue
        final = [record for run in plan.final(choose_rates(plan.bench, found)) if (record := ledger.find(run))]
        benches[name] = settings_of(plan, found + final)
        rows += rows_of(plan.bench, final)
        runs += found + final
    differences = differences_of(rows)
    return {
        "command": command,
        "hardware": hardware(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu_minutes": sum(run["cpu_seconds"] for run in runs) / 60,
        "benches": benches,
        "summaries": summaries_of(differences),
        "rows": rows,
        "differences": differences,
        "runs": runs,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benches", nargs="+", choices=sorted(BENCHES), default=list(BENCHES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="learning rates to search")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--search-seed", type=int, default=100)
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--epochs", type=int, help="if not the experiment's own")
    parser.add_argument("--search-epochs", type=int, help="if not the same")
    parser.add_argument("--images", type=int, help="train on the first so many alone")
    parser.add_argument("--out", type=Path, default=Path("mtl_experiment_output"))
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    if args.search_seed in args.seeds:
        parser.error(f"--search-seed {args.search_seed} is one of --seeds: rates must be chosen on another")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in [] if args.report else args.benches:
        plan = plan_of(name, args)
        (args.out / f"plan_{name}.json").write_text(json.dumps(plan.settings()))
        conduct(plan, Ledger(args.out / f"runs_{name}.jsonl"))
    report = report_of(args.out, "python examples/mtl/experiment.py")
    (args.out / "mtl_experiment.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    (args.out / "mtl_experiment.md").write_text(text)
    draw(report, args.out / "mtl_experiment.png")
    print(text)


if __name__ == "__main__":
    main()
