"""
The tables of the thesis's chapter 3, for the invented world or for data of your own.

    python examples/ck_transformer/tables.py search    # table 3.1: facts by words, text, or text and image
    python examples/ck_transformer/tables.py facts     # figure 1 of appendix A.6: K, with M = 1
    python examples/ck_transformer/tables.py blocks    # figure 2 of appendix A.6: M, with K = 3
    python examples/ck_transformer/tables.py mcnemar before/predictions.json after/predictions.json   # table A.2
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ck.runs import comparison, tasks
from ck.runs.experiment import Settings, Task, find_facts, run
from transformers import set_seed


VARIANTS = ("word", "text", "multimodal")
Row = dict[str, Any]


def search_table(task: Task, settings: Settings, options: argparse.Namespace) -> Iterator[Row]:
    rights: dict[str, dict[str, bool]] = {}
    for variant in VARIANTS:
        own = settings.but(search=variant)
        facts = find_facts(task, own, own.num_facts)
        if not rights:  # whatever facts: they are masked
            rights["no facts"] = run(task, own.but(no_facts=True), facts).right
            yield {"facts": "none", "accuracy": comparison.accuracy(rights["no facts"])}
        result = run(task, own, facts)
        p_value = comparison.mcnemar(rights["no facts"], result.right).p_value
        recall = facts.recall(task.test, own.num_facts)
        yield {"facts": variant, "accuracy": result.accuracy, "recall": recall, "p against none": p_value}


def facts_table(task: Task, settings: Settings, options: argparse.Namespace) -> Iterator[Row]:
    facts = find_facts(task, settings, max(options.values or [5]))
    for count in options.values or [0, 1, 3, 5]:
        own = settings.but(num_facts=count, num_blocks=1)
        yield {"K": count, "accuracy": run(task, own, facts).accuracy, "recall": facts.recall(task.test, count)}


def blocks_table(task: Task, settings: Settings, options: argparse.Namespace) -> Iterator[Row]:
    facts = find_facts(task, settings, settings.num_facts)
    for count in options.values or [1, 2, 3]:
        yield {"M": count, "accuracy": run(task, settings.but(num_blocks=count), facts).accuracy}


TABLES: dict[str, Callable[[Task, Settings, argparse.Namespace], Iterator[Row]]] = {
    "search": search_table,
    "facts": facts_table,
    "blocks": blocks_table,
}


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    description, _, usage = (__doc__ or "").strip().partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = parser.add_subparsers(dest="table", required=True)
    for name in TABLES:
        own = tables.add_parser(name)
        tasks.add(own)
        own.add_argument("--out", type=Path, default=Path("ck_transformer_output"), help="[%(default)s]")
        if name != "search":
            own.add_argument("--values", type=int, nargs="+", help="to try")
    pair = tables.add_parser("mcnemar", help="of two models on the same samples")
    pair.add_argument("predictions", type=Path, nargs=2, help="of the first and of the second model")
    options = parser.parse_args(argv)
    if options.table == "mcnemar":
        before, after = map(comparison.load, options.predictions)
        test = comparison.mcnemar(before, after)
        print(
            f"accuracy {comparison.accuracy(before):.4f} and {comparison.accuracy(after):.4f}; right alone: the first "
            f"{test.first_only}, the second {test.second_only}; p = {test.p_value:.3g}"
        )
        return 0
    tasks.check(options, tables.choices[options.table])
    set_seed(options.seed)
    rows = []
    for row in TABLES[options.table](tasks.task(options), tasks.settings(options), options):
        print("  ".join(f"{name} {shown(value)}" for name, value in row.items()), flush=True)
        rows.append(row)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"table_{options.table}.json").write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
