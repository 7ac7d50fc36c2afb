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
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _shapes.batches import Batches, accuracy
from _shapes.rates import LEARNING_RATES
from _shapes.world import PALETTE
from tqdm import tqdm
from transformers import AutoProcessor, LlavaForConditionalGeneration, get_cosine_schedule_with_warmup

from peft_ext.factory import Method
from peft_ext.factory.parts import adapt, trained_parameters
from peft_ext.io import write_atomically
from peft_ext.knockout.read.modality import ModalityAttention, lmar
from peft_ext.knockout.read.modality_plots import plot_modality


CHECKPOINT = Path(__file__).parent / "shapes_llava"
RANKS, PERCENTS = (1, 2, 4, 8), (1, 25, 50, 100)
METHODS = (
    "none",
    "full",
    "lora-8",
    "ia3",
    *(f"mores-{rank}@{percent}" for rank in RANKS for percent in PERCENTS),
    "connector-1",
    "connector-4",
    "projector",
    "mores-1@1+",
)
# The picture's colours move by one: what looks green is called red now.
SHIFTED = dict(zip(PALETTE, [*list(PALETTE.values())[1:], next(iter(PALETTE.values()))], strict=True))
SHOWN = ("none", "full", "lora-8", "ia3", "mores-1@1", "mores-8@100")  # in the figure
SETTINGS = ("steps", "images", "turns", "questions", "lmar_samples", "system")
COLOR_TASKS = ("QueryColor", "QueryShape", "ChooseAttr", "ChooseCat", "LogicalObj")
OTHER_TASKS = ("QueryAttr", "ChooseRel")


def train(model: Any, batches: Batches, steps: int, learning_rate: float, images: int, turns: int) -> None:
    """AdamW with a cosine schedule on conversations of the shifted world, all tasks."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimiser, steps // 20, steps)
    model.train()
    for _ in range(steps):
        loss = model(**batches.conversations(images, turns)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    model.eval()


def run(name: str, seed: int, options: argparse.Namespace, learning_rate: float | None = None) -> dict[str, Any]:
    """One method, one seed."""
    processor = AutoProcessor.from_pretrained(options.model)
    model = LlavaForConditionalGeneration.from_pretrained(options.model).eval()
    torch.manual_seed(seed)
    trained = 0
    if name != "none":
        method = Method.parse(name)
        model = adapt(model, method)
        trained = trained_parameters(model)
        rate = LEARNING_RATES[method.kind] if learning_rate is None else learning_rate
        train(model, Batches(processor, seed, SHIFTED), options.steps, rate, options.images, options.turns)
    held_out = Batches(processor, 10_000 + seed, SHIFTED)
    number = options.questions
    scores = {
        "color": accuracy(model, held_out, number, COLOR_TASKS),
        "other": accuracy(model, held_out, number, OTHER_TASKS),
    }
    batch, _ = Batches(processor, 20_000 + seed, SHIFTED).questions(options.lmar_samples)
    attention = lmar(model, [batch], system=options.system)
    return {
        "method": name,
        "seed": seed,
        "trained_parameters": trained,
        "accuracy": scores,
        "lmar": attention.ratio.tolist(),
        "image_share": attention.image_share.mean(dim=0).tolist(),
    }


def search(options: argparse.Namespace) -> None:
    """Accuracy of each kind of method at learning rates half a decade apart, with a seed of its own."""
    examples = {"full": "full", "lora": "lora-8", "ia3": "ia3", "mores": "mores-4@100", "connector": "connector-4"}
    for kind, name in examples.items():
        for rate in options.rates:
            result = run(name, 999, options, rate)
            print(
                f"{kind:10} {rate:.0e} color {result['accuracy']['color']:.3f} other {result['accuracy']['other']:.3f}"
            )


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per method: mean and standard deviation over seeds."""
    rows = []
    known = {result["method"] for result in results}
    for name in [*(name for name in METHODS if name in known), *sorted(known - set(METHODS))]:
        mine = [result for result in results if result["method"] == name]
        row: dict[str, Any] = {"method": name, "trained_parameters": mine[0]["trained_parameters"]}
        row["seeds"] = len(mine)
        series = {
            "color": [result["accuracy"]["color"] for result in mine],
            "other": [result["accuracy"]["other"] for result in mine],
            "lmar": [statistics.mean(result["lmar"]) for result in mine],
            "image_share": [statistics.mean(result["image_share"]) for result in mine],
        }
        for key, values in series.items():
            row[key] = statistics.mean(values)
            row[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | trained | seeds | accuracy, colours | accuracy, places | LMAR | attention on the image |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [f"{row[key]:.3f} ± {row[f'{key}_sd']:.3f}" for key in ("color", "other", "lmar", "image_share")]
        lines.append(f"| {row['method']} | {row['trained_parameters']:,} | {row['seeds']} | {' | '.join(cells)} |")
    return "\n".join(lines)


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


def pool(results: list[dict[str, Any]]) -> ModalityAttention:
    """The seeds' LMAR and shares, one sample each."""
    ratio = torch.tensor([result["lmar"] for result in results], dtype=torch.float64).unsqueeze(2)
    share = torch.tensor([result["image_share"] for result in results], dtype=torch.float64)
    return ModalityAttention(ratio, torch.ones_like(ratio), share)


if __name__ == "__main__":
    main()
