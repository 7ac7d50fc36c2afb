"""
NeuroAda from install to merge, beside LoRA, two sparse tuners of PEFT, BitFit, a linear probe and full fine-tuning.

    python examples/quickstart.py

pretrains a small ViT on scikit-learn's digits 0-4, adapts it to digits 5-9 with every method (the learning rate of
each searched on a validation split, with equal effort), and prints one table. It needs no network and no GPU.

    python examples/quickstart.py --model HuggingFaceTB/SmolLM2-135M --dataset roneneldan/TinyStories

does the same job with TRL on a causal language model and a text data set, from the Hub or from local paths.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any


# Waiting threads of OpenMP spin by default: where something else runs on the same cores, steps take ten times longer.
# Read once, when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from _quickstart import checks, comparison, data, methods, report
from _quickstart.command import begin, check_counts, parser_for
from _quickstart.search import SPACING


def parser() -> argparse.ArgumentParser:
    options = parser_for(__doc__, "quickstart_output")
    options.add_argument("--k", type=int, default=1, help="NeuroAda's bypasses per neuron [%(default)s]")
    options.add_argument(
        "--seeds", type=int, help="runs per method that the result is averaged over [3; with --model 1]"
    )
    options.add_argument(
        "--trials",
        type=int,
        help="learning rates tried per method, half a decade apart [4; with --model 1: the method's default]",
    )
    options.add_argument("--smoke", action="store_true", help="smallest possible run: does it work, not how well")

    language = options.add_argument_group("causal language model, with TRL (pip install 'peft-ext[trl]')")
    language.add_argument("--model", help="Hub id or folder of a causal language model: switches to this mode")
    language.add_argument(
        "--dataset", help="Hub id, folder or file (json, jsonl, csv, parquet, txt) of a text data set"
    )
    language.add_argument("--dataset-config", help="configuration of the data set, where it has several")
    language.add_argument("--split", default="train", help="split to train on; part of it is held out [%(default)s]")
    language.add_argument("--text-column", default="text", help="column that holds the text [%(default)s]")
    language.add_argument("--max-steps", type=int, default=100, help="optimiser steps per run [%(default)s]")
    language.add_argument("--max-length", type=int, default=512, help="tokens per example [%(default)s]")
    language.add_argument("--batch-size", type=int, default=8, help="examples per step [%(default)s]")
    language.add_argument("--max-examples", type=int, default=20_000, help="examples read at most [%(default)s]")
    language.add_argument("--lr", type=float, help="one learning rate for all methods, instead of their defaults")
    language.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="modules to adapt [all linear layers but the head]"
    )
    return options


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    options = parser()
    chosen = options.parse_args(argv)
    if bool(chosen.model) != bool(chosen.dataset):
        options.error("--model and --dataset go together: give both, or none for the offline digits")
    if chosen.model and find_spec("trl") is None:
        options.error("--model trains with TRL, which is not installed: pip install 'peft-ext[trl]'")
    check_counts(options, chosen, ("k", "seeds", "trials", "max_steps", "max_length", "batch_size", "max_examples"))
    if chosen.lr is not None and chosen.trials not in (None, 1):
        options.error(f"--lr fixes the learning rate, --trials {chosen.trials} searches it: give one of the two")
    return chosen


def run_digits(options: argparse.Namespace) -> tuple[str, list[checks.Check], dict[str, Any]]:
    """The offline comparison: the text to print, the checks, and the content of the JSON."""
    from _quickstart import figure  # matplotlib takes a second to import and only this mode draws

    settings = comparison.SMOKE if options.smoke else comparison.QUICK
    settings = replace(settings, seeds=options.seeds or settings.seeds, trials=options.trials or settings.trials)
    digits = data.load()
    job = comparison.Comparison(settings, digits, methods.methods(options.k), options.out)
    accuracy = job.pretrain()
    rows, checked = job.run()
    figure.draw(rows, options.out / "quickstart.png", "ViT pretrained on digits 0-4, adapted to 5-9")

    shira = methods.shira_budget(job.base, methods.neuroada_count(job.base, options.k))
    notes = [
        f"ViT with {sum(p.numel() for p in job.base.parameters()):,} parameters, {100 * accuracy:.1f} % on held-out "
        f"digits 0-4; adapted to 5-9 with {len(digits.train)} images, tested on {len(digits.test)}.",
        f"{settings.seeds} seed(s); learning rate of every method: best of {settings.trials} trial(s), a factor "
        f"{SPACING:.2g} apart, on {len(digits.validation)} validation images.",
        "The classifier is trained by all: it is part of 'trained params' and of the file.",
        f"SHiRA: r={shira[0]} on {', '.join(shira[1])}, its closest to NeuroAda's count; "
        "other adapters: all linear layers.",
        f"Step time: median ratio of {settings.timing_rounds} interleaved steps of "
        f"{settings.adaptation.batch_size} images. Memory: peak during steps, beyond the base weights.",
    ]
    text = "\n".join([report.table(rows, "test accuracy", True, "LoRA"), "", *notes])
    content = {
        "task": "digits",
        "settings": asdict(settings) | {"k": options.k, "learning_rate_spacing": SPACING, "smoke": options.smoke},
        "images": digits.sizes(),
        "pretraining_accuracy": accuracy,
        "search_seed": comparison.SEARCH_SEED,
        "split_seed": data.SPLIT_SEED,
        "metric": "test accuracy",
        "relative_to": comparison.REFERENCE,
        "rows": [row.as_json() for row in rows],
    }
    return text, checked, content


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    start = time.perf_counter()
    begin(options.out)
    if options.model:
        from _quickstart import causal_lm, texts  # need TRL, which the offline comparison does without

        try:
            text, checked, content = causal_lm.run(options)
        except texts.UsageError as error:
            parser().error(str(error))
    else:
        text, checked, content = run_digits(options)
    content |= {"checks": [asdict(check) for check in checked], "environment": report.environment()}
    content["wall_seconds"] = time.perf_counter() - start
    report.write_json(options.out / "quickstart.json", content)
    print(f"\n{text}\n\nNeuroAda adapter saved, reloaded on a fresh base model, merged:")
    print("\n".join(f"  {check}" for check in checked))
    print(f"\n{content['wall_seconds']:.0f} s. Results, adapters and figure: {options.out}/")
    return 0 if all(check.passed for check in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
