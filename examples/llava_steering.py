"""
Compose a LLaVA, align its connector, adapt it by any method, and compare accuracy and attention before and after.

    python examples/llava_steering.py --method mores-1@1

runs offline on the shapes world: the parts are the text model and the vision tower of `examples/shapes_llava` with a
new connector. Stage 1 trains the connector alone; stage 2 adapts the model to a shifted task (every colour has another
name) by the method. Methods: full, lora-8, ia3, oft-8, mores-<rank>@<percent>, connector-<rank>, neuroada-<k>.

    python examples/llava_steering.py --text-model microsoft/phi-2 --vision-tower google/siglip-so400m-patch14-384 \\
        --align-data blip_laion_cc_sbu_558k.json --data llava_v1_5_mix665k.json --images DIR --method mores-1@1

does the same with models and data in LLaVA's layout; `--data derek-thomas/ScienceQA` (or VizWiz, IconQA, or any data
set of images, questions and answers) takes one from the Hub, and `--model llava-hf/llava-1.5-7b-hf` a whole model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _shapes.world import PALETTE
from _steering import composing, data, running
from _steering.methods import Method, trained_parameters
from transformers import set_seed

from peft_ext.knockout.read.modality_plots import plot_modality


SHAPES = Path(__file__).parent / "shapes_llava"
SHIFTED = dict(zip(PALETTE, [*list(PALETTE.values())[1:], next(iter(PALETTE.values()))], strict=True))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="a whole vision-language model: Hub id or folder; skips stage 1")
    model.add_argument("--text-model", help="compose: causal language model, Hub id or folder")
    model.add_argument("--vision-tower", help="compose: vision model, Hub id or folder")
    model.add_argument("--vision-layer", type=int, default=-2, help="compose: layer of the tower used (%(default)s)")
    source = parser.add_argument_group("data")
    source.add_argument("--data", default="shapes", help="shapes, a JSON file in LLaVA's layout, or a Hub data set")
    source.add_argument("--align-data", help="the same for stage 1 (with --data shapes: the world before the shift)")
    source.add_argument("--images", type=Path, default=Path(), help="folder of the images that a JSON file names")
    source.add_argument("--split", default="train", help="split of a Hub data set to train on (%(default)s)")
    source.add_argument("--test-split", default="test", help="split of a Hub data set to test on (%(default)s)")
    source.add_argument("--samples", type=int, default=2000, help="samples to train on (%(default)s)")
    source.add_argument("--test-samples", type=int, default=256, help="samples to test on (%(default)s)")
    training = parser.add_argument_group("training")
    training.add_argument("--method", default="mores-1@1", help="how to adapt (%(default)s)")
    training.add_argument("--library", choices=("trainer", "trl"), default="trainer", help="(%(default)s)")
    training.add_argument("--align-steps", type=int, default=150, help="steps of stage 1 (%(default)s)")
    training.add_argument("--align-learning-rate", type=float, default=3e-3, help="of stage 1 (%(default)s)")
    training.add_argument("--steps", type=int, default=150, help="steps of stage 2 (%(default)s)")
    training.add_argument("--learning-rate", type=float, help="of stage 2 (default: the method's)")
    training.add_argument("--batch-size", type=int, default=32, help="(%(default)s)")
    training.add_argument("--gradient-checkpointing", action="store_true")
    training.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("llava_steering_output"), help="folder (%(default)s)")
    args = parser.parse_args(argv)
    if bool(args.text_model) != bool(args.vision_tower):
        parser.error("--text-model and --vision-tower go together")
    if args.model and args.text_model:
        parser.error("--model is a whole model; leave out --text-model and --vision-tower")
    for name in ("samples", "test_samples", "steps", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.align_steps < 0:
        parser.error(f"--align-steps must not be negative, got {args.align_steps}")
    for name in (args.data, args.align_data):
        if name is not None and name.endswith(".json") and not Path(name).is_file():
            parser.error(f"--data and --align-data: there is no file {name}")
    try:
        args.method = Method.parse(args.method)
    except ValueError as error:
        parser.error(f"--method: {error}")
    return args


def samples_of(name: str, number: int, seed: int, split: str, args: argparse.Namespace, shifted: bool) -> Any:
    """Samples from wherever `name` says."""
    if name == "shapes":
        return data.shapes(number, seed, SHIFTED if shifted else PALETTE)
    if name.endswith(".json"):
        return data.llava_file(Path(name), args.images, number)
    return data.hub_dataset(name, split, number)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    set_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.model:
        composed = composing.load(args.model)
    elif args.text_model:
        composed = composing.compose(args.text_model, args.vision_tower, args.vision_layer)
    else:
        composed = composing.forget_connector(composing.load(str(SHAPES)))
    model, processor = composed.model, composed.processor
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    report: dict[str, Any] = {"method": args.method.name, "seed": args.seed}

    if not args.model and args.align_steps:
        print("Stage 1: aligning the connector")
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        aligned_on = samples_of(args.align_data or args.data, args.samples, args.seed, args.split, args, False)
        report["alignment_loss"] = running.train(
            model,
            processor,
            aligned_on,
            args.out / "alignment",
            steps=args.align_steps,
            batch_size=args.batch_size,
            learning_rate=args.align_learning_rate,
            seed=args.seed,
        )

    held_out = samples_of(args.data, args.test_samples, args.seed + 10_000, args.test_split, args, True)
    if args.data.endswith(".json"):  # one file: its last samples are not trained on
        training = samples_of(args.data, args.samples + args.test_samples, args.seed, args.split, args, True)
        if len(training) <= args.test_samples:
            raise SystemExit(f"{args.data} has {len(training)} samples with an image; lower --test-samples")
        training, held_out = training[: -args.test_samples], training[-args.test_samples :]
    else:
        training = samples_of(args.data, args.samples, args.seed + 1, args.split, args, True)
    probes = held_out[: min(64, len(held_out))]

    def look(name: str) -> None:
        score = running.exact_match(model, processor, held_out, args.batch_size)
        attention[name] = running.measure(model, processor, probes, args.batch_size)
        report[name] = {"exact_match": score, "lmar": attention[name].ratio.tolist()}
        print(f"{name}: exact match {score:.3f}, LMAR {attention[name].ratio.mean():.3f}")

    attention: dict[str, Any] = {}
    look("before")
    print(f"Stage 2: {args.method.name}")
    model = args.method.adapt(model)
    report["trained_parameters"] = trained_parameters(model)
    print(f"trained parameters: {report['trained_parameters']:,}")
    report["loss"] = running.train(
        model,
        processor,
        training,
        args.out / "training",
        library=args.library,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate or args.method.learning_rate,
        seed=args.seed,
        checkpointing=args.gradient_checkpointing,
    )
    look("after")
    model.save_pretrained(args.out / "adapted")
    processor.save_pretrained(args.out / "adapted")
    plot_modality(attention, args.out / "lmar.png")
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"Results are in {args.out}")
    return report


if __name__ == "__main__":
    main()
