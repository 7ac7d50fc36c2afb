"""`peft-ext flow`: from a model and a file of questions to the figures of information flow."""

from __future__ import annotations

import argparse
from pathlib import Path


DESCRIPTION = (
    "Block the attention between groups of tokens in a window around each layer, and measure what the probability of "
    "the model's answer loses. Groups: image, question, last, text, newline, true_option, false_option, options, "
    "objects, question_without_options, question_without_objects, related_patches, other_patches. Under "
    "'accelerate launch -m peft_ext.cli flow …' several processes share the questions."
)
EXAMPLE = """example:
  peft-ext flow --model llava-hf/llava-1.5-7b-hf --data ChooseAttr.csv --images images --pad --out flow"""
PAIRS = "image:last,question:last,last:last,image:question"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    parser.add_argument("--model", required=True, help="folder or Hub id of a vision-language model")
    parser.add_argument("--adapter", help="folder or Hub id of a PEFT adapter for it")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", help="CSV with question, answer and img_id (or image), such as GQA's published files"
    )
    source.add_argument("--dataset", help="Hugging Face data set, folder or Hub id, with question, answer and image")
    parser.add_argument("--images", help="folder of the images of --data")
    parser.add_argument("--split", default="train", help="part of --dataset (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for results; a sweep that is there continues")
    parser.add_argument("--pairs", default=PAIRS, help="source:target, separated by commas (default: %(default)s)")
    parser.add_argument(
        "--window", type=int, default=9, help="layers that are blocked together (default: %(default)s)"
    )
    parser.add_argument(
        "--mode", choices=("centred", "forward"), default="centred", help="where a window lies (default: %(default)s)"
    )
    parser.add_argument(
        "--engine", choices=("auto", "full", "suffix", "packed"), default="auto", help="default: %(default)s"
    )
    parser.add_argument("--answer-token", default="first", help="first, last or a number (default: %(default)s)")
    parser.add_argument("--prompt", help="with {question} and the image's placeholder (default: the chat template)")
    parser.add_argument("--suffix", default="", help="text after the question inside the chat template")
    parser.add_argument("--pad", action="store_true", help="pad images to a square instead of cropping, as LLaVA does")
    parser.add_argument("--limit", type=int, help="questions to use at most")
    parser.add_argument("--all-answers", action="store_true", help="keep questions that the model answers wrongly")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="of an answer (default: %(default)s)")
    parser.add_argument("--answer-by-layer", action="store_true", help="also read the answer after each layer")
    parser.add_argument(
        "--no-final-norm", action="store_true", help="read it without the final norm (thesis, eq. 7.8)"
    )
    parser.add_argument("--jaccard", action="store_true", help="also compare the question's top words without modules")
    parser.add_argument("--report", type=Path, help="also write one HTML page of it all, such as out/report.html")
    parser.add_argument(
        "--report-samples", type=int, default=20, help="questions that it shows one by one (default: %(default)s)"
    )
    parser.add_argument(
        "--report-targets",
        default="last",
        help="groups from which it hides each patch and word, separated by commas; of n tokens this takes n times as "
        'long as of the last one; "" for none (default: %(default)s)',
    )
    parser.add_argument("--report-block", type=int, default=1, help="patches per side hidden together (default: 1)")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="default: %(default)s"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from ..knockout.cli import run

    return run(options)
