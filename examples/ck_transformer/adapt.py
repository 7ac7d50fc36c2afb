"""
One CK-Transformer, adapted by NeuroAda, GPS, LoRA and full fine-tuning.

    python examples/ck_transformer/adapt.py

trains the model in the invented world, and adapts it to worlds of other categories whose facts are worded in another
way. Integrator and scorer are trained too, at the same learning rate for all methods; that of the rest is the best of
three in a world of its own. Each trained model is saved, loaded, and merged, and has to score the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ck.runs import tasks
from ck.runs.adapting import RATES, row, score, target
from ck.runs.experiment import find_facts, run
from ck.runs.training import Recipe
from transformers import set_seed


def table(options: argparse.Namespace) -> list[dict[str, Any]]:
    set_seed(options.seed)
    settings, task = tasks.settings(options), tasks.task(options)
    facts = find_facts(task, settings, settings.num_facts)
    first = run(task, settings, facts)
    targets = [
        target(100 + seed, facts.embed, first.processor, options.adapt_samples, options.test_samples)
        for seed in range(options.seeds + 1)
    ]
    before = statistics.fmean(score(first.model, own) for own in targets[1:])
    print(f"accuracy in the world of training {first.accuracy:.3f}, in the new ones before adapting {before:.3f}")
    rows: list[dict[str, Any]] = [{"method": "before", "mean": before}]
    for name in options.methods:
        rows.append(row(name, first.model, targets, Recipe(options.adapt_steps, 8, seed=options.seed), options.trials))
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in rows[-1].items()
            )
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    description, _, usage = (__doc__ or "").strip().partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks.add(parser)
    parser.add_argument("--methods", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--adapt-steps", type=int, default=120, help="[%(default)s]")
    parser.add_argument("--adapt-samples", type=int, default=480, help="of a new world, to train on [%(default)s]")
    parser.add_argument("--trials", type=int, default=3, help="learning rates per method [%(default)s]")
    parser.add_argument(
        "--seeds", type=int, default=3, help="new worlds that the result is averaged over [%(default)s]"
    )
    parser.add_argument("--out", type=Path, default=Path("ck_transformer_output"), help="[%(default)s]")
    options = parser.parse_args(argv)
    tasks.check(options, parser)
    if options.data != "world":
        parser.error("--data: this comparison is of the invented world; README.md shows how to adapt your own model")
    rows = table(options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "adapt.json").write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
