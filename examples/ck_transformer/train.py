"""
Train and test a CK-Transformer: fact search first, then the classifier with the facts found.

    python examples/ck_transformer/train.py

does so in the invented world, offline. With data of your own:

    python examples/ck_transformer/train.py --data kbref --root KB-Ref --encoder visualbert \\
        --features regions.safetensors --facts KB-Ref/Wikipedia.json KB-Ref/ConceptNet.json KB-Ref/WebChild.json

The defaults are then the thesis's. It saves the models, and in predictions.json which test expressions are right, for
`tables.py mcnemar`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ck.model.config import VARIANTS
from ck.model.search import FactSearch
from ck.runs import comparison, tasks
from ck.runs.experiment import find_facts, run, train_search
from transformers import set_seed


def main(argv: Sequence[str] | None = None) -> int:
    description, _, usage = (__doc__ or "").strip().partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks.add(parser)
    parser.add_argument("--search", choices=(*VARIANTS, "word"), default="multimodal", help="[%(default)s]")
    parser.add_argument("--trained-search", type=Path, help="folder of a fact search to use instead of training one")
    parser.add_argument("--no-facts", action="store_true", help="one mask token in the place of every fact (CK-T-nf)")
    parser.add_argument("--out", type=Path, default=Path("ck_transformer_output"), help="[%(default)s]")
    options = parser.parse_args(argv)
    tasks.check(options, parser)
    set_seed(options.seed)
    settings = tasks.settings(options).but(search=options.search, no_facts=options.no_facts)
    task = tasks.task(options)
    search = None
    if options.trained_search:
        search = FactSearch.from_pretrained(options.trained_search)
    elif settings.search != "word" and not options.no_facts:
        search = train_search(task, settings)
        search.save_pretrained(options.out / "search")
    if options.no_facts:
        settings = settings.but(search="word")  # facts are masked: any will do
    facts = find_facts(task, settings, settings.num_facts, search)
    result = run(task, settings, facts)
    result.model.save_pretrained(options.out / "model")
    result.processor.save_pretrained(options.out / "model")
    comparison.save(options.out / "predictions.json", result.right)
    recall = facts.recall(task.test, settings.num_facts)
    numbers = {"accuracy": result.accuracy, "recall": recall, "test": len(task.test)}
    (options.out / "result.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(
        f"accuracy {numbers['accuracy']:.4f} on {len(task.test)} expressions, "
        f"recall of their facts at K={settings.num_facts}: {numbers['recall']:.4f}. Saved in {options.out}/"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
