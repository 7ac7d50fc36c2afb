"""
What the methods are worth on pretrained models: every comparison of examples/_evidence/README.md.

    python examples/pretrained/packages.py             # fetches models and data, once
    python examples/evidence.py --out evidence_output  # about six hours of two cores

Finished runs are kept, a line of JSON each: an interrupted experiment goes on. Writes `evidence.md` and its `.json`.

    python examples/evidence.py --quick                # does all of it run? under three minutes
    python examples/evidence.py --quick --stand-ins    # the same without the downloads, on tiny random models
    python examples/evidence.py --model FacebookAI/roberta-base --data imdb:text:label --methods neuroada-k1 lora-r8

The last compares methods by the same protocol on any model and table of the Hub or of this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any


# As in the quick start: spinning threads of OpenMP slow each other down. Read once, when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.append(str(Path(__file__).parent / "mtl"))

import torch
from _benches.runs import Run as TasksRun
from _evidence import cost, merging, runs, tables, tasks, unmerging
from _evidence.experiments import Plan, quick, with_stand_ins
from _evidence.merging import MergeRun
from _evidence.methods import Method, refusal
from _evidence.protocol import Comparison, conduct
from _evidence.runs import Run
from _evidence.unmerging import UnmergeRun
from _evidence.workers import Workers
from _experiment.plan import Ledger
from _experiment.report import body
from _quickstart import report
from _quickstart.search import Search


REFERENCE = "lora-r8"  # of times
OWN_METHODS = ("neuroada-k1", "lora-r8", "probe")  # on a model of one's own


class Evidence:
    """
    Runs experiments and keeps what they give.

    Args:
        plan (`Plan`): sizes.
        out (`Path`): folder for the runs and the report.
        workers (`Workers`): where trainings run.
    """

    def __init__(self, plan: Plan, out: Path, workers: Workers) -> None:
        self.plan, self.out, self.workers = plan, out, workers
        self.searches: dict[str, dict[Any, Search]] = {}
        self.text: list[str] = []
        self.content: dict[str, Any] = {}

    def ledger(self, name: str, run_type: Any) -> Ledger:
        return Ledger(self.out / f"runs_{name}.jsonl", run_type)

    def trainer(self, execute: Callable[[Any], dict[str, Any]], ledger: Ledger, title: str) -> Any:
        return partial(self.workers.train, execute=execute, ledger=ledger, title=title)

    def run(self, name: str) -> None:
        """One experiment, by its name."""
        others = {"tasks": self.tasks, "merging": self.merging, "unmerging": self.unmerging, "cost": self.cost}
        others[name]() if name in others else self.compare(self.plan.comparison(name))

    def compare(self, comparison: Comparison) -> None:
        """Search, train and tabulate."""
        base = comparison.run(comparison.cells[0], comparison.data[0], 0.0, 0).problem.base
        reasons = {name: refusal(base, Method.parse(name)) for name in comparison.methods}
        refused = {name: reason for name, reason in reasons.items() if reason is not None}
        comparison = replace(comparison, methods=tuple(name for name in comparison.methods if name not in refused))
        ledger = self.ledger("comparisons", Run)
        searches = conduct(comparison, ledger, self.trainer(runs.execute, ledger, comparison.name))
        found = tables.rows(comparison, searches, ledger)
        self.content[comparison.name] = {"settings": vars(comparison), "refused": refused, "rows": found}
        self.text += tables.comparison_table(comparison, found, refused)

    def rates(self, methods: Sequence[str]) -> tuple[Comparison, dict[str, float]]:
        """`neuroada-by-loss`, and the learning rates that it has for these methods."""
        comparison = self.plan.comparison("neuroada-by-loss")
        searched = replace(comparison, methods=tuple(methods), data=())
        ledger = self.ledger("comparisons", Run)
        searches = conduct(searched, ledger, self.trainer(runs.execute, ledger, "learning rates"))
        chosen = {method: found.best.learning_rate for (method, _), found in searches.items()}
        return comparison, chosen

    def merging(self) -> None:
        """Adapters of all domains in one."""
        sizes = self.plan.merging
        base, rates = self.rates(sizes.methods)
        ((size, steps),) = base.steps.items()
        wanted = [
            MergeRun(
                base.model,
                sizes.data,
                method,
                size,
                steps,
                base.batch_size,
                rates[method],
                seed,
                sizes.validation,
                sizes.test,
            )
            for seed in sizes.seeds
            for method in sizes.methods
        ]
        self.others("merging", MergeRun, merging.execute, wanted, tables.merging_table)

    def unmerging(self) -> None:
        """Drift of weights that are merged into and unmerged from."""
        sizes = self.plan.unmerging
        base, rates = self.rates(sizes.methods)
        size = max(base.steps)
        wanted = [
            UnmergeRun(base.model, base.data[0], method, size, base.batch_size, rates[method], 0, sizes.cycles, 64)
            for method in sizes.methods
        ]
        self.others("unmerging", UnmergeRun, unmerging.execute, wanted, tables.unmerging_table)

    def others(self, name: str, run_type: Any, execute: Any, wanted: Sequence[Any], show: Any) -> None:
        ledger = self.ledger(name, run_type)
        self.workers.train(wanted, execute, ledger, name)
        records = [ledger[run] for run in wanted]
        self.content[name] = records
        self.text += show(records)

    def tasks(self) -> None:
        """Four domains as four tasks."""
        plan = tasks.plan(self.plan.tasks)
        ledger = self.ledger("tasks", TasksRun)
        chosen = tasks.conduct(plan, self.plan.tasks.widenings, ledger, self.trainer(tasks.execute, ledger, "tasks"))
        found = tasks.report(plan, ledger, chosen)
        self.content["tasks"] = found
        self.text += [*body(found), *tasks.loss_table(found["runs"])]

    def cost(self) -> None:
        """Time and memory of a step; nothing else should run meanwhile."""
        comparison = self.plan.comparisons[0]
        rounds = 20 if max(comparison.steps.values()) > 10 else 2
        methods = list(dict.fromkeys([*comparison.methods, REFERENCE]))
        found = cost.measure(comparison, methods, REFERENCE, rounds)
        self.content["cost"] = found
        self.text += tables.cost_table(found, REFERENCE)


def parser() -> argparse.ArgumentParser:
    description, _, usage = (__doc__ or "").strip().partition("\n\n")
    options = argparse.ArgumentParser(
        description=description, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path("evidence_output"), help="folder for results [%(default)s]")
    jobs = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    options.add_argument("--jobs", type=int, default=jobs, help="processes of one thread [cores; with a GPU 1]")
    options.add_argument(
        "--experiments", nargs="+", choices=Plan().names, metavar="NAME", help=", ".join(Plan().names)
    )
    options.add_argument("--quick", action="store_true", help="smallest run of everything: does it work, not how well")
    options.add_argument("--stand-ins", action="store_true", help="tiny random models and made-up data: no downloads")
    own = options.add_argument_group("a model and data of your own")
    own.add_argument("--model", help="Hub id or folder, or one of minilm, smollm2, dinov2, efficientnet")
    own.add_argument("--data", nargs="+", help="movies, mnist, …, or SOURCE:TEXT_COLUMN:LABEL_COLUMN of a table")
    own.add_argument("--methods", nargs="+", help=f"[{' '.join(OWN_METHODS)}]; beside --experiments: these alone")
    own.add_argument("--size", type=int, default=1000, help="training samples [%(default)s]")
    own.add_argument("--steps", type=int, default=100, help="of every training [%(default)s]")
    own.add_argument("--batch-size", type=int, default=16, help="[%(default)s]")
    own.add_argument("--image-size", type=int, help="height and width that images are scaled to")
    own.add_argument("--pooling", choices=("mean", "first", "last"), help="of positions into one vector [the model's]")
    own.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base [%(default)s]")
    return options


def own_comparison(options: argparse.Namespace) -> Comparison:
    """What `--model` and the options beside it ask for."""
    return Comparison(
        name="own",
        title=f"{options.model}",
        model=options.model,
        methods=tuple(options.methods or OWN_METHODS),
        data=tuple(options.data),
        search_data=tuple(options.data),
        steps={options.size: options.steps},
        batch_size=options.batch_size,
        image_size=options.image_size,
        pooling=options.pooling,
        dtype=options.dtype,
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    if bool(options.model) != bool(options.data):
        parser().error("--model and --data go together: give both, or none for the experiments")
    if options.jobs < 1:
        parser().error(f"--jobs is {options.jobs}: must be at least 1")
    if options.methods and not (options.model or options.experiments):
        parser().error("--methods needs --model or --experiments: the methods of all experiments differ")
    begin = time.perf_counter()
    plan = Plan(comparisons=(own_comparison(options),)) if options.model else Plan()
    if options.methods:
        plan = replace(plan, comparisons=tuple(replace(c, methods=tuple(options.methods)) for c in plan.comparisons))
    plan = quick(plan) if options.quick else plan
    plan = with_stand_ins(plan) if options.stand_ins else plan
    names = ["own"] if options.model else options.experiments or plan.names
    options.out.mkdir(parents=True, exist_ok=True)
    with Workers(options.jobs) as workers:
        evidence = Evidence(plan, options.out, workers)
        for name in names:
            evidence.run(name)
            content = {**evidence.content, "environment": report.environment()}
            content["wall_seconds"] = time.perf_counter() - begin
            (options.out / "evidence.json").write_text(json.dumps(content, indent=1, default=str) + "\n")
            (options.out / "evidence.md").write_text("\n".join(["# Evidence", "", *evidence.text]))
    print((options.out / "evidence.md").read_text())


if __name__ == "__main__":
    main()
