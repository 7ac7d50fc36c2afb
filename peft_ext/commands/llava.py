"""`peft-ext llava`: compose a vision-language model, train it in two stages, evaluate it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .method_names import matched_name


DESCRIPTION = (
    "The LLaVA Steering Factory (Bi et al., section 6). Under 'accelerate launch -m peft_ext.cli llava train …' "
    "several processes train together. docs/llava-factory.md goes through a run."
)
EXAMPLE = """example:
  peft-ext llava compose llava --text-model microsoft/phi-2 --vision-tower openai/clip-vit-large-patch14-336
  peft-ext llava train align --config align.yaml
  peft-ext llava evaluate --model llava --task pope --questions pope.json --images images"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    compose = steps.add_parser("compose", help="put a language model behind a vision tower")
    compose.add_argument("out", type=Path, help="folder to write to")
    compose.add_argument("--text-model", required=True, help="causal language model, Hub id or folder")
    compose.add_argument("--vision-tower", required=True, help="vision model, Hub id or folder")
    compose.add_argument("--connector", default="mlp2x_gelu", help="name of the connector (default: %(default)s)")
    compose.add_argument("--connector-config", type=json.loads, help='its options in JSON, such as {"queries": 32}')
    compose.add_argument("--feature-layer", type=int, default=-2, help="layer of the tower (default: %(default)s)")
    compose.add_argument(
        "--chat-template",
        default="auto",
        help="auto (the language model's own), vicuna, chatml, plain or a Jinja file",
    )
    compose.add_argument("--pad", action="store_true", help="pad images to squares instead of cropping them")
    compose.add_argument("--dtype", default="auto", help="dtype of all parts (default: the language model's)")
    compose.add_argument("--seed", type=int, default=0, help="of the connector's weights (default: %(default)s)")

    train = steps.add_parser("train", help="train a stage")
    train.add_argument("stage", choices=("align", "tune"), help="whose defaults are taken")
    train.add_argument("--config", type=Path, help="YAML file of what differs from the stage's defaults")
    train.add_argument(
        "--method", type=_method, help="how the language model is adapted: language_model of the settings"
    )
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a single setting, repeatable")

    config = steps.add_parser("config", help="print a stage's defaults as YAML")
    config.add_argument("stage", choices=("align", "tune"))

    evaluate = steps.add_parser("evaluate", help="ask a benchmark's questions")
    evaluate.add_argument("--model", action="append", required=True, help="Hub id or folder of a model; repeatable")
    evaluate.add_argument("--adapter", action="append", default=[], help="folder of the first one's; repeatable")
    evaluate.add_argument("--before", action="store_true", help="ask the first model without an adapter, too")
    evaluate.add_argument("--task", required=True, help="vqav2, gqa, textvqa, vizwiz, scienceqa, pope, mme or llava")
    evaluate.add_argument("--questions", required=True, help="file (mme: folder) of the benchmark")
    evaluate.add_argument("--annotations", help="file of answers (vqav2)")
    evaluate.add_argument("--images", help="folder of images (default: that of the questions)")
    evaluate.add_argument("--limit", type=int, help="questions to use at most")
    evaluate.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    evaluate.add_argument("--max-new-tokens", type=int, default=16, help="of an answer (default: %(default)s)")
    evaluate.add_argument("--lmar-samples", type=int, default=0, help="questions to measure LMAR on (default: none)")
    evaluate.add_argument("--dtype", default="auto", help="default: %(default)s")
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of a table")
    evaluate.add_argument("--out", type=Path, help="folder for report.json, table.md, answers and LMAR's figure")

    count = steps.add_parser("methods", help="count what methods train in a model, without its weights")
    count.add_argument("--model", required=True, help="Hub id or folder of a model")
    count.add_argument("--json", action="store_true", help="print JSON instead of a table")
    count.add_argument(
        "--methods", nargs="+", type=_method, default=["full", "lora", "ia3", "oft", "mores-b", "mores-l", "mores-h"]
    )


def _method(name: str) -> str:
    if name != "frozen" and not name.startswith("{"):  # the options of a PEFT configuration, in YAML
        try:
            matched_name(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return name


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    steps = {"compose": _compose, "train": _train, "config": _config, "evaluate": _evaluate, "methods": _methods}
    steps[options.step](options)
    return 0


def _compose(options: argparse.Namespace) -> None:
    from transformers import set_seed

    from ..export.folder import filled_at_once
    from ..factory.compose import compose

    set_seed(options.seed)
    with filled_at_once(options.out, "config.json") as folder:
        composed = compose(
            options.text_model,
            options.vision_tower,
            options.connector,
            connector_config=options.connector_config,
            feature_layer=options.feature_layer,
            template=options.chat_template,
            pad=options.pad,
            dtype=options.dtype,
        )
        composed.model.save_pretrained(folder)
        composed.processor.save_pretrained(folder)
    print(f"{options.out}: {type(composed.model).__name__}, {composed.model.config.image_seq_length} tokens an image")


def _train(options: argparse.Namespace) -> None:
    from ..factory.train import read_settings, train

    changes = [*options.set, *([f"language_model={options.method}"] if options.method else [])]
    train(read_settings(options.stage, options.config, changes))


def _config(options: argparse.Namespace) -> None:
    from ..factory.train import defaults

    print(defaults(options.stage), end="")


def _evaluate(options: argparse.Namespace) -> None:
    from ..factory.evaluate import evaluate, read_questions, table

    first, *others = options.model
    models = [(first, None)] if options.before or not options.adapter else []
    models += [(model, None) for model in others] + [(first, adapter) for adapter in options.adapter]
    questions = read_questions(options.task, options.questions, options.images, options.annotations, options.limit)
    reports = evaluate(
        models,
        options.task,
        questions,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        lmar_samples=options.lmar_samples,
        dtype=options.dtype,
        out=options.out,
    )
    print(json.dumps(reports, indent=2) if options.json else table(reports))


def _methods(options: argparse.Namespace) -> None:
    from ..factory.parts import counts

    found = counts(options.model, options.methods)
    lines = (
        f"{name:12} " + ", ".join(f"{part} {number:,}" for part, number in parts.items())
        for name, parts in found.items()
    )
    print(json.dumps(found, indent=2) if options.json else "\n".join(lines))
