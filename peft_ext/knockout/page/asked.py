"""The page of `peft-ext flow`: views of the questions that a sweep asked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from ..ask import Asker
from ..prompts.questions import Question
from ..sweep.records import Record
from .report import Report, report
from .views import SampleView, sample_view


def report_questions(
    asker: Asker,
    questions: Sequence[Question],
    records: Sequence[Record],
    path: str | os.PathLike[str],
    *,
    limit: int,
    title: str,
    skipped: Sequence[Mapping[str, str]],
    **options: Any,
) -> Report:
    """
    Measure the first questions anew for their views, and write the page. Questions beyond `limit` show their curves
    alone. `title` and `skipped` are those of [`report`], `options` those of [`sample_view`].
    """
    views: list[SampleView] = []
    for question in tqdm(questions[:limit], desc="views"):
        sample = asker.sample(question)
        if sample is None:
            views.append(SampleView(question.name, question.text, problem=asker.skipped[-1][1]))
            continue
        try:
            views.append(
                sample_view(
                    asker.model,
                    asker.processor,
                    sample,
                    question.open_image(),
                    question.text,
                    answer_token=asker.answer_token,
                    image_options=asker.image_options,
                    self_check=not views,
                    **options,
                )
            )
        except ValueError as reason:
            views.append(SampleView(question.name, question.text, image=question.image, problem=str(reason)))
    views += [SampleView(question.name, question.text) for question in questions[limit:]]
    return report(records, views, path, title=title, skipped=skipped)
