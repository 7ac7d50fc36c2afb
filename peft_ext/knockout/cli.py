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

from ..extras import needs
from ..io import write_atomically
from .ask import Asker, check_groups
from .page import SampleView, report, sample_view
from .plots import plot_answer_probability, plot_jaccard, plot_sweep
from .prompts.questions import Question, read_csv, read_dataset
from .prompts.samples import LazySample, parse_pairs
from .read.jaccard import topk_jaccard
from .read.lens import answer_probability_by_layer
from .sweep.processes import this_process
from .sweep.records import Record, write_records
from .sweep.sweep import layer_sweep


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


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    with needs("plot"):  # now, and not when the sweep is through
        import matplotlib  # noqa: F401
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
        image_options={"do_pad": True} if options.pad else {},
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


def _device(name: str | None) -> torch.device:
    try:
        name = name or ("cuda" if torch.cuda.is_available() else "cpu")
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
    write_records(options.out / "skipped.jsonl", reasons)
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
        write_records(options.out / "skipped.jsonl", reasons + lost)
    if options.report is not None:
        page = report(records, _views(options, asker, asked), options.report, title=title, skipped=reasons)
        print(f"Page: {page.path}")


def _views(options: argparse.Namespace, asker: Asker, questions: Sequence[Question]) -> list[SampleView]:
    """Measure the first questions anew for the page. Those beyond `--report-samples` show their curves alone."""
    views: list[SampleView] = []
    for question in tqdm(questions[: options.report_samples], desc="views"):
        sample = asker.sample(question)
        if sample is None:
            views.append(SampleView(question.name, question.text, problem=asker.skipped[-1][1]))
            continue
        try:
            view = sample_view(
                asker.model,
                asker.processor,
                sample,
                question.open_image(),
                question.text,
                targets=_report_targets(options),
                window=options.window,
                mode=options.mode,
                block=options.report_block,
                answer_token=asker.answer_token,
                norm=not options.no_final_norm,
                image_options=asker.image_options,
                self_check=not views,
            )
        except ValueError as reason:
            view = SampleView(question.name, question.text, image=question.image, problem=str(reason))
        views.append(view)
    return views + [SampleView(question.name, question.text) for question in questions[options.report_samples :]]


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
        write_records(options.out / "answer_by_layer.jsonl", answers)
        plot_answer_probability(answers, options.out / "answer_by_layer.png")
    if jaccard:
        write_records(options.out / "jaccard.jsonl", jaccard)
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
