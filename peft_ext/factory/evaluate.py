"""Evaluation: generated answers to a benchmark's questions, their scores, and LMAR."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm

from ..knockout.read.modality import ModalityAttention, lmar
from ..knockout.read.modality_plots import plot_modality
from ..knockout.sweep.records import write_records
from .benchmarks import BENCHMARKS, Question
from .compose import Composed, load
from .data import Sample
from .masking import render


def load_adapted(model: str, adapter: str | None = None, dtype: str = "auto") -> Composed:
    """A model in eval mode on the GPU, if there is one, with an adapter or without."""
    composed = load(model, dtype=dtype)
    if adapter is not None:
        composed.model = PeftModel.from_pretrained(composed.model, adapter)
    composed.model = composed.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return composed


@torch.no_grad()
def generate(composed: Composed, samples: list[Sample], batch_size: int, max_new_tokens: int = 16) -> list[str]:
    """Greedy answers to the samples' first questions, in batches padded on the left."""
    model, processor = composed.model, composed.processor
    order = sorted(range(len(samples)), key=lambda number: len(str(samples[number].messages)))
    answers = [""] * len(samples)
    for start in tqdm(range(0, len(order), batch_size), desc="answering", leave=False, disable=None):
        part = order[start : start + batch_size]
        batch = _inputs(composed, [samples[number] for number in part])
        output = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        texts = processor.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for number, text in zip(part, texts, strict=True):
            answers[number] = text.strip()
    return answers


def _inputs(composed: Composed, samples: list[Sample]) -> dict[str, Any]:
    batch = dict(prompts(composed.processor, samples).to(composed.model.device))
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(composed.model.dtype)
    return batch


def prompts(processor: Any, samples: list[Sample]) -> Any:
    """The samples' questions, up to where the first answer begins, padded on the left."""
    texts = [render(processor, sample.question(), prompt=True) for sample in samples]
    pictures = [picture for sample in samples for picture in sample.pictures()]
    return processor(
        images=pictures or None,
        text=texts,
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )


def measure_lmar(composed: Composed, samples: list[Sample], batch_size: int, **choices: Any) -> ModalityAttention:
    """LMAR on the samples' prompts; `choices` are [`~peft_ext.knockout.read.modality.lmar`]'s."""
    starts = range(0, len(samples), batch_size)
    batches = (_inputs(composed, samples[start : start + batch_size]) for start in starts)
    return lmar(composed.model, batches, **choices)


def read_questions(
    task: str, path: str, images: str | None, annotations: str | None, limit: int | None
) -> list[Question]:
    """
    A benchmark's questions.

    Raises:
        `ValueError`: if there is no such benchmark, or its files are of another layout.
    """
    if task not in BENCHMARKS:
        raise ValueError(f"task={task!r} is not known; use one of {', '.join(BENCHMARKS)}.")
    folder = Path(images) if images is not None else Path(path).parent
    try:
        questions = BENCHMARKS[task][0](Path(path), folder, None if annotations is None else Path(annotations))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not in the layout of {task}: {error!r}.") from error
    if not questions:
        raise ValueError(f"{path} has no questions of {task}.")
    return questions[:limit]


def evaluate(
    models: Sequence[tuple[str, str | None]],
    task: str,
    questions: list[Question],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 16,
    lmar_samples: int = 0,
    dtype: str = "auto",
    out: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """
    Ask several models a benchmark's questions.

    Args:
        models (`list[tuple[str, str | None]]`): folders or Hub ids of models, each with an adapter's or `None`.
        task (`str`): the benchmark.
        questions (`list[Question]`): from [`read_questions`].
        batch_size (`int`), max_new_tokens (`int`): of generation.
        lmar_samples (`int`): number of questions to measure LMAR on.
        dtype (`str`): to load the models in.
        out (`Path`, *optional*): folder for `report.json`, `table.md`, each model's answers (one JSON object a line),
            and LMAR's figure `lmar.png`.

    Returns:
        `dict`: by model or adapter, `questions`, the benchmark's scores, and `lmar` (per layer) if it was asked for.
    """
    samples = [question.sample for question in questions]
    reports: dict[str, dict[str, Any]] = {}
    attention: dict[str, ModalityAttention] = {}
    if out is not None:
        if lmar_samples and find_spec("matplotlib") is None:
            raise ValueError("LMAR's figure needs matplotlib: pip install 'peft-ext[plot]', or leave out --out.")
        out.mkdir(parents=True, exist_ok=True)
    for number, (model, adapter) in enumerate(models):
        name = adapter or model
        composed = load_adapted(model, adapter, dtype)
        answers = generate(composed, samples, batch_size, max_new_tokens)
        reports[name] = {"questions": len(questions), **BENCHMARKS[task][1](questions, answers)}
        if lmar_samples:
            attention[name] = measure_lmar(composed, samples[:lmar_samples], batch_size)
            reports[name]["lmar"] = attention[name].ratio.tolist()
        if out is not None:
            rows = [
                {"question": q.sample.messages[-1]["content"], "answer": a, "references": q.references}
                for q, a in zip(questions, answers, strict=True)
            ]
            write_records(out / f"answers_{number}.jsonl", rows)
    if out is not None:
        (out / "report.json").write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
        (out / "table.md").write_text(table(reports) + "\n", encoding="utf-8")
        if attention:
            plot_modality(attention, out / "lmar.png")
    return reports


def table(reports: dict[str, dict[str, Any]]) -> str:
    """Reports by name as one Markdown table; LMAR as the mean over layers."""
    names = list(dict.fromkeys(key for report in reports.values() for key in report if key != "lmar"))
    with_lmar = any("lmar" in report for report in reports.values())
    lines = [f"| model | {' | '.join(names)}{' | LMAR' if with_lmar else ''} |"]
    lines.append("|---" * (len(names) + 1 + with_lmar) + "|")
    for name, report in reports.items():
        cells = [f"{report[key]:g}" if key == "questions" else f"{report.get(key, float('nan')):.1f}" for key in names]
        if with_lmar:
            ratios = report.get("lmar")
            cells.append("" if ratios is None else f"{sum(ratios) / len(ratios):.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
