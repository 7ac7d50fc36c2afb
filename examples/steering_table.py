"""
MoReS of several ranks and token ratios beside LoRA, IA3 and full training, on a shifted task of the shapes world.

    python examples/steering_table.py --out examples/results/steering

A call with the same folder and settings goes on where an interrupted one stopped.

The tiny LLaVA of `examples/shapes_llava` knows four colours. In the shifted task every colour has another name, so
that it first gets every question about colours wrong. Each method is trained on the same scenes for the same number of
steps, three seeds, with a learning rate found for each kind of method on another seed (`--search`). The table has the
accuracy on new scenes, the number of trained parameters, and LMAR (attention on image over attention on text, mean
over layers), beside what the paper claims.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _shapes.rates import LEARNING_RATES
from _shapes.steering import METHODS, markdown, pool, run, summarise
from tqdm import tqdm

from peft_ext.io import write_atomically
from peft_ext.knockout.read.modality_plots import plot_modality


CHECKPOINT = Path(__file__).parent / "shapes_llava"
SHOWN = ("none", "full", "lora-8", "ia3", "mores-1@1", "mores-8@100")  # in the figure
SETTINGS = ("steps", "images", "turns", "questions", "lmar_samples", "system")


def search(options: argparse.Namespace) -> None:
    """Accuracy of each kind of method at learning rates half a decade apart, with a seed of its own."""
    examples = {"full": "full", "lora": "lora-8", "ia3": "ia3", "mores": "mores-4@100", "connector": "connector-4"}
    for kind, name in examples.items():
        for rate in options.rates:
            result = run(name, 999, options, rate)
            print(
                f"{kind:10} {rate:.0e} color {result['accuracy']['color']:.3f} other {result['accuracy']['other']:.3f}"
            )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("steering_table"), help="folder for results (%(default)s)")
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="the tiny LLaVA (%(default)s)")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help=f"({' '.join(METHODS)})")
    parser.add_argument("--seeds", type=int, default=3, help="runs per method (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="training steps (%(default)s)")
    parser.add_argument("--images", type=int, default=8, help="scenes of a batch (%(default)s)")
    parser.add_argument("--turns", type=int, default=4, help="questions about each scene (%(default)s)")
    parser.add_argument("--questions", type=int, default=256, help="held-out questions per score (%(default)s)")
    parser.add_argument("--lmar-samples", type=int, default=32, help="samples for LMAR (%(default)s)")
    parser.add_argument("--system", default="exclude", help="system tokens in LMAR: exclude or text (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument("--rates", nargs="+", type=float, default=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1), help="to search")
    parser.add_argument("--search", action="store_true", help="search learning rates instead of making the table")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.search:
        search(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    results = read(options)
    done = {(result["method"], result["seed"]) for result in results}
    jobs = [(name, seed) for seed in range(options.seeds) for name in options.methods]
    # Those of the figure first, so that an interrupted table has all seeds of the methods that matter most.
    jobs.sort(key=lambda job: job[0] not in SHOWN)
    for name, seed in tqdm([job for job in jobs if job not in done], desc="runs"):
        results.append(run(name, seed, options))
        write(options, results)
    print(markdown(summarise(results)))


def write(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Everything so far, after every run."""
    rows = summarise(results)
    settings = {key: getattr(options, key) for key in SETTINGS}
    content = {"settings": settings, "learning_rates": LEARNING_RATES, "summary": rows, "runs": results}
    write_atomically(str(options.out / "steering_table.json"), json.dumps(content, indent=1) + "\n")
    write_atomically(str(options.out / "steering_table.md"), markdown(rows) + "\n")
    shown = [name for name in SHOWN if name in {row["method"] for row in rows}]
    if shown:
        pooled = {name: pool([result for result in results if result["method"] == name]) for name in shown}
        parameters = {row["method"]: row["trained_parameters"] for row in rows}
        plot_modality(pooled, options.out / "steering_lmar.png", {name: parameters[name] for name in shown})


def read(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs of an earlier call with the same settings.

    Raises:
        `SystemExit`: if the folder has results of other settings.
    """
    path = options.out / "steering_table.json"
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    settings = {key: getattr(options, key) for key in SETTINGS}
    if content["settings"] != settings or content["learning_rates"] != LEARNING_RATES:
        raise SystemExit(
            f"--out {options.out} has results of other settings, {content['settings']}; name a new folder."
        )
    return content["runs"]


if __name__ == "__main__":
    main()
