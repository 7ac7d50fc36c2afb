"""
The LLaVA Steering Factory end to end on the shapes world, offline: compose, align, adapt by any method, evaluate.

    python examples/llava_steering.py --method mores-1@1

The parts are the text model and the vision tower of `examples/shapes_llava` with a new connector. Stage 1 trains the
connector alone; stage 2 adapts the model to a shifted task (every colour has another name) by the method. Accuracy and
LMAR are measured before and after. Each step is the command `peft-ext llava`, printed as it is run; the same commands
take other models, and data in LLaVA's layout (docs/llava-factory.md).
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _shapes.parts import write_parts, write_questions
from _shapes.rates import LEARNING_RATES
from _shapes.world import PALETTE

from peft_ext.cli import main as command
from peft_ext.factory import Method


# The picture's colours move by one: what looks green is called red now.
SHIFTED = dict(zip(PALETTE, [*list(PALETTE.values())[1:], next(iter(PALETTE.values()))], strict=True))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="mores-1@1", help="how to adapt (%(default)s)")
    parser.add_argument("--connector", default="mlp2x_gelu", help="name of the connector (%(default)s)")
    parser.add_argument("--library", choices=("trainer", "trl"), default="trainer", help="(%(default)s)")
    parser.add_argument("--samples", type=int, default=2000, help="samples of each stage (%(default)s)")
    parser.add_argument("--test-samples", type=int, default=256, help="samples to test on (%(default)s)")
    parser.add_argument("--align-steps", type=int, default=150, help="steps of stage 1 (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="steps of stage 2 (%(default)s)")
    parser.add_argument("--learning-rate", type=float, help="of stage 2 (default: the method's, found on this world)")
    parser.add_argument("--batch-size", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("llava_steering_output"), help="new folder (%(default)s)")
    args = parser.parse_args(argv)
    for name in ("samples", "test_samples", "align_steps", "steps", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.out.exists():
        parser.error(f"--out {args.out} is there already; name a new folder")
    try:
        args.learning_rate = args.learning_rate or LEARNING_RATES[Method.parse(args.method).kind]
    except ValueError as error:
        parser.error(f"--method: {error}")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    out = args.out
    write_parts(out)
    write_questions(out / "align.json", args.samples, args.seed)
    write_questions(out / "tune.json", args.samples, args.seed + 1, SHIFTED)
    write_questions(out / "test.json", args.test_samples, args.seed + 10_000, SHIFTED)

    def run(*words: object) -> None:
        print("$ peft-ext llava", shlex.join(map(str, words)), flush=True)
        if command(["llava", *map(str, words)]):
            raise SystemExit(1)

    def train(stage: str, model: str, steps: int, rate: float, *settings: str) -> None:
        settings = (
            f"model={out / model}",
            f"output={out / stage}",
            f"data=[{{path: {out / stage}.json}}]",
            f"library={args.library}",
            f"arguments.max_steps={steps}",
            f"arguments.learning_rate={rate}",
            f"arguments.per_device_train_batch_size={args.batch_size}",
            f"arguments.warmup_steps={max(1, steps // 20)}",
            f"arguments.logging_steps={max(1, steps // 10)}",
            f"arguments.seed={args.seed}",
            "arguments.train_sampling_strategy=random",
            "arguments.dataloader_num_workers=0",
            "arguments.gradient_checkpointing=false",
            "arguments.save_strategy=no",
            *settings,
        )
        run("train", stage, *(word for setting in settings for word in ("--set", setting)))

    options = ["--feature-layer", "-1", "--chat-template", out / "template.jinja", "--seed", args.seed]
    parts = ["--text-model", out / "text", "--vision-tower", out / "tower", "--connector", args.connector]
    run("compose", out / "composed", *parts, *options)
    train("align", "composed", args.align_steps, 3e-3)
    train("tune", "align", args.steps, args.learning_rate, *trained(args.method))
    whole = Method.parse(args.method).kind in ("full", "projector", "bitfit")
    questions = ["--task", "llava", "--questions", out / "test.json", "--batch-size", args.batch_size]
    questions += ["--lmar-samples", min(64, args.test_samples), "--max-new-tokens", 8]
    adapted = ["--model", out / "tune"] if whole else ["--adapter", out / "tune", "--before"]
    run("evaluate", "--model", out / "align", *adapted, *questions, "--out", out / "evaluation")
    report: dict[str, Any] = {"method": args.method, "seed": args.seed}
    report |= {stage: json.loads((out / stage / "report.json").read_text()) for stage in ("align", "tune")}
    report["before"], report["after"] = json.loads((out / "evaluation" / "report.json").read_text()).values()
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def trained(method: str) -> tuple[str, str]:
    """The settings of a method: full training has the connector with it, `projector` is the connector alone."""
    connector = "full" if method in ("full", "projector") else "frozen"
    return f"connector={connector}", f"language_model={'frozen' if method == 'projector' else method}"


if __name__ == "__main__":
    main()
