"""
Does the CK-Transformer use its facts? A control in an invented world, where nothing else can decide.

    python examples/ck_transformer/positive_control.py

trains fact search and classifier, and a classifier without facts, on three worlds (no network, no GPU), and tests them
on categories and facts that they have not seen. It passes if every seed has at least 95 % with facts, and without them
at most ten points above chance.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process per seed: threads would get in each other's way

from ck.runs.comparison import mcnemar
from ck.runs.experiment import Settings, find_facts, run
from ck.world.pretraining import WORLD_RECIPE, WORLD_SEARCH, world_task


CANDIDATES, LEAST, MOST = 6, 0.95, 1 / 6 + 0.1


def one_seed(seed: int, smoke: bool = False) -> dict[str, Any]:
    """Accuracies with and without facts, and what lies between."""
    start = time.perf_counter()
    sizes = (16, 8, 2) if smoke else (2400, 400, 200)  # samples to train on and to test on, steps of pretraining
    search, recipe = (replace(recipe, seed=seed) for recipe in (WORLD_SEARCH, WORLD_RECIPE))
    if smoke:
        search, recipe = replace(search, steps=2), replace(recipe, steps=2)
    own = Settings(num_heads=4, dropout=0.0, search_recipe=search, recipe=recipe)
    task = world_task(seed, *sizes)
    facts = find_facts(task, own, own.num_facts)
    with_facts = run(task, own, facts)
    without = run(task, own.but(no_facts=True), facts)
    return {
        "seed": seed,
        "recall": facts.recall(task.test, own.num_facts),
        "with_facts": with_facts.accuracy,
        "without_facts": without.accuracy,
        "mcnemar_p": mcnemar(with_facts.right, without.right).p_value,
        "seconds": time.perf_counter() - start,
    }


def main(argv: Sequence[str] | None = None) -> int:
    description, _, usage = (__doc__ or "").strip().partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("ck_transformer_output"), help="[%(default)s]")
    parser.add_argument("--smoke", action="store_true", help="smallest possible run: does it work, not how well")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    with ProcessPoolExecutor(len(options.seeds), mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(one_seed, options.seeds, [options.smoke] * len(options.seeds)))
    print(f"{'seed':>4}{'recall of the fact':>20}{'with facts':>12}{'without':>10}{'McNemar p':>12}")
    for row in rows:
        cells = f"{row['seed']:4}{row['recall']:20.3f}{row['with_facts']:12.3f}{row['without_facts']:10.3f}"
        print(f"{cells}{row['mcnemar_p']:12.1e}")
    passed = all(row["with_facts"] >= LEAST and row["without_facts"] <= MOST for row in rows)
    seconds = time.perf_counter() - start
    print(
        f"{'passed' if passed else 'NOT PASSED'}: at least {LEAST:.0%} with facts, at most {MOST:.1%} without "
        f"(chance {1 / CANDIDATES:.1%}); {seconds:.0f} s"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"rows": rows, "passed": passed, "seconds": seconds}
    (options.out / "positive_control.json").write_text(json.dumps(content, indent=2) + "\n")
    return 0 if passed or options.smoke else 1


if __name__ == "__main__":
    raise SystemExit(main())
