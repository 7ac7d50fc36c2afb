"""`peft-ext flow`: from a model and a file of questions to the figures of information flow."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..io import write_atomically
from .ask import Asker, check_groups
from .page.asked import report_questions
from .plots import plot_answer_probability, plot_jaccard, plot_sweep
from .prompts.questions import Question, read_csv, read_dataset
from .prompts.samples import LazySample, parse_pairs
from .read.jaccard import topk_jaccard
from .read.lens import answer_probability_by_layer
from .sweep.engines import ENGINES
from .sweep.processes import this_process
from .sweep.records import Record
from .sweep.sweep import layer_sweep
from .sweep.windows import MODES


DESCRIPTION = (
    "Block the attention between groups of tokens in a window around each layer, and measure what the probability of "
    "the model's answer loses. Groups: image, question, last, text, newline, true_option, false_option, options, "
    "objects, question_without_options, question_without_objects, related_patches, other_patches. Under "
    "'accelerate launch -m peft_ext.cli flow …' several processes share the questions."
)
PAIRS = "image:last,question:last,last:last,image:question"
# Options with another value of which the results in a folder may not be continued.
_OF_ONE_RUN = (
    "model",
    "adapter",
    "data",
    "dataset",
    "split",
    "prompt",
    "suffix",
    "pad",
    "all_answers",
    "max_new_tokens",
    "dtype",
)
_DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    parser.add_argument("--mode", choices=MODES, default="centred", help="where a window lies (default: %(default)s)")
    parser.add_argument("--engine", choices=("auto", *ENGINES), default="auto", help="default: %(default)s")
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
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="default: %(default)s")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    pairs = parse_pairs(options.pairs)
    targets = _report_targets(options)
    groups = sorted({group for pair in pairs for group in pair} | set(targets))
    check_groups(groups)
    questions = _questions(options)
    which = int(options.answer_token) if options.answer_token.isdecimal() else options.answer_token
    _check_same_run(options)
    model, processor = _load(options)
    asker = Asker(
        model,
        processor,
        groups,
        prompt=options.prompt,
        suffix=options.suffix,
        image_options={"do_pad": True} if options.pad else None,
        only_correct=not options.all_answers,
        max_new_tokens=options.max_new_tokens,
        answer_token=which,
    )
    lazy = [LazySample(question.name, lambda question=question: asker.sample(question)) for question in questions]  # type: ignore[misc]
    if this_process().is_main_process:
        _write_settings(options)
    records = layer_sweep(
        model,
        lazy,
        pairs,
        window=options.window,
        mode=options.mode,
        engine=options.engine,
        answer_token=which,
        output=options.out / "sweep.jsonl",
    )
    names = {question.name for question in questions}
    records = [record for record in records if record["sample"] in names]
    skipped = gather_object(asker.skipped)  # of all processes
    if this_process().is_main_process:
        _report(options, asker, skipped, questions, records)
    return 0


def _report_targets(options: argparse.Namespace) -> list[str]:
    """Check the page's options before anything is run."""
    if options.report is not None and options.report.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--report is {str(options.report)!r}: it is an HTML file, so it must end in .html.")
    for name in ("report_samples", "report_block"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}: must be at least 1.")
    given = options.report_targets if options.report is not None else ""
    return [name.strip() for name in given.split(",") if name.strip()]


def _questions(options: argparse.Namespace) -> list[Question]:
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit is {options.limit}: must be at least 1.")
    if options.data:
        if not options.images:
            raise ValueError("--data needs --images, the folder of its images.")
        return read_csv(options.data, options.images, options.limit)
    return read_dataset(options.dataset, options.split, options.limit)


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    state = this_process()
    device = state.device if state.num_processes > 1 else _device(options.device)
    processor = AutoProcessor.from_pretrained(options.model)
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=_DTYPES[options.dtype])
    if options.adapter:
        model = PeftModel.from_pretrained(model, options.adapter)
    return model.to(device).eval(), processor


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch says that a device is not there in either way
        raise ValueError(f"--device is {name!r}: {str(error).splitlines()[0]}") from None


def _check_same_run(options: argparse.Namespace) -> None:
    """
    Refuse to go on with the results of something else.

    Raises:
        `ValueError`: naming an option that has another value than before.
    """
    results, file = options.out / "sweep.jsonl", options.out / "settings.json"
    if not (file.exists() and results.exists() and results.stat().st_size):
        return
    try:
        before = dict(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no settings of a sweep ({error}): give another folder.") from None
    for name in _OF_ONE_RUN:
        now = getattr(options, name)
        if before.get(name) != now:
            raise ValueError(
                f"--out {options.out} holds results with --{name.replace('_', '-')} {before.get(name)!r}, not "
                f"{now!r}: give another folder."
            )


def _write_settings(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in _OF_ONE_RUN}
    write_atomically(str(options.out / "settings.json"), json.dumps(settings, indent=2) + "\n")


def _report(
    options: argparse.Namespace,
    asker: Asker,
    skipped: Sequence[tuple[str, str]],
    questions: Sequence[Question],
    records: list[Record],
) -> None:
    reasons = [{"sample": name, "reason": reason} for name, reason in skipped]
    _write_lines(options.out / "skipped.jsonl", reasons)
    if not records:
        first = f"; the first: {reasons[0]['sample']}: {reasons[0]['reason']}" if reasons else ""
        raise ValueError(f"no question of {len(questions)} could be used{first}. See {options.out / 'skipped.jsonl'}.")
    title = f"{Path(options.model).name}, window of {options.window}"
    rows = plot_sweep(records, options.out / "flow.png", title=title)
    print(table(rows))
    used = {record["sample"] for record in records}
    why = f" ({options.out / 'skipped.jsonl'} says why not the others)" if len(used) < len(questions) else ""
    print(f"\n{len(used)} of {len(questions)} questions used{why}. Results, numbers and figures: {options.out}/")
    asked = [question for question in questions if question.name in used]
    if options.answer_by_layer or options.jaccard:
        lost = _readouts(options, asker, asked, records)
        _write_lines(options.out / "skipped.jsonl", reasons + lost)
    if options.report is not None:
        page = report_questions(
            asker,
            asked,
            records,
            options.report,
            limit=options.report_samples,
            title=title,
            skipped=reasons,
            targets=_report_targets(options),
            window=options.window,
            mode=options.mode,
            block=options.report_block,
            norm=not options.no_final_norm,
        )
        print(f"Page: {page.path}")


def _readouts(
    options: argparse.Namespace, asker: Asker, questions: list[Question], records: list[Record]
) -> list[dict[str, str]]:
    """Write the readouts of the questions that were used; returns those that are gone since, with the reasons."""
    read = {record["sample"]: record["answer_id"] for record in records}
    answers: list[Record] = []
    jaccard: list[Record] = []
    lost: list[dict[str, str]] = []
    for question in tqdm(questions, desc="readouts"):
        try:
            inputs, groups = asker.ready(question)
        except ValueError as reason:
            lost.append({"sample": question.name, "reason": f"no readouts: {reason}"})
            continue
        if options.answer_by_layer:
            first = read[question.name] if options.answer_token in ("first", "0") else asker.answer(inputs)[0][0]
            words = asker.words(question, first)
            answers += answer_probability_by_layer(
                asker.model, inputs, words, norm=not options.no_final_norm, names=[question.name]
            )
        if options.jaccard:
            jaccard += topk_jaccard(
                asker.model, inputs, groups["question"], window=options.window, names=[question.name]
            )
    if answers:
        _write_lines(options.out / "answer_by_layer.jsonl", answers)
        plot_answer_probability(answers, options.out / "answer_by_layer.png")
    if jaccard:
        _write_lines(options.out / "jaccard.jsonl", jaccard)
        plot_jaccard(jaccard, options.out / "jaccard.png")
    return lost


def table(rows: Sequence[dict[str, Any]], by: str = "pair") -> str:
    """Each curve's deepest layer, of [`plot_sweep`]'s numbers, as text."""
    lines = [f"{by:40} {'layer':>5} {'change %':>9}   95 % interval      samples"]
    for curve in dict.fromkeys(row[by] for row in rows):
        low = min((row for row in rows if row[by] == curve), key=lambda row: row["mean"])
        interval = f"[{low['low']:.1f}, {low['high']:.1f}]"
        lines.append(f"{curve:40} {low['layer']:5d} {low['mean']:9.1f}   {interval:18} {low['samples']:7d}")
    return "\n".join(lines)


def _write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    write_atomically(str(path), "".join(json.dumps(record) + "\n" for record in records))
