"""Write the page."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...io import write_atomically
from ..sweep.records import Record
from .data import COLUMNS, differences, label, overview, sample_data
from .views import SampleView


_SCRIPTS = ("charts.js", "patches.js", "words.js", "pairs.js", "page.js")


class Report:
    """
    A page made by [`report`]. A notebook displays it.

    Attributes:
        html (`str`):
            The whole page.
        path (`pathlib.Path`, *optional*):
            The file that it was written to.
    """

    def __init__(self, page: str, path: Path | None = None) -> None:
        self.html, self.path = page, path

    def _repr_html_(self) -> str:
        return (
            '<iframe title="Information flow" sandbox="allow-scripts" style="width: 100%; height: 60rem; border: 0" '
            f'srcdoc="{html.escape(self.html)}"></iframe>'
        )


def report(
    records: Sequence[Record] | Mapping[str, Sequence[Record]],
    samples: Iterable[SampleView] | Mapping[str, Iterable[SampleView]] = (),
    path: str | os.PathLike[str] | None = None,
    *,
    title: str = "Information flow",
    skipped: Sequence[Mapping[str, str]] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> Report:
    """
    Make one HTML file that shows a sweep and its samples. It needs no network and runs no code but its own.

    A slider moves all views through the layers: the curves of each pair with 95 % intervals over samples, the
    attention and the effect of each patch over the image, the prompt's tokens, the answer's probability and the most
    probable words, and the share of image and text.

    Args:
        records (`list[dict]`):
            Records of [`layer_sweep`]. To compare two models, or one with and without an adapter, pass several such
            lists by name.
        samples (`list[SampleView]`, *optional*):
            Views made by [`sample_view`], for all samples of the records or some. By the same names as `records` if
            those have names. A sample without a view shows its curves alone.
        path (`str`, *optional*):
            File of the page, `*.html`. Without it, a notebook still displays the returned page.
        title (`str`, *optional*):
            Title of the page.
        skipped (`list[dict]`, *optional*):
            `sample` and `reason` of questions that were left out. They are listed.
        resamples (`int`, *optional*, defaults to 1000):
            Number of bootstrap samples, as for [`plot_sweep`].
        seed (`int`, *optional*, defaults to 0):
            Seed of the bootstrap.

    Returns:
        [`Report`]: The page.

    Raises:
        `ValueError`: If an argument is malformed, or records and samples do not belong together, before anything is
            written.
    """
    if path is not None and Path(path).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"path is {os.fspath(path)!r}: a report is an HTML file, so it must end in .html.")
    runs = _runs(records)
    views = _views(samples, runs)
    names = list(dict.fromkeys(str(record["sample"]) for own in runs.values() for record in own))
    names.sort(key=lambda name: not any(name in own for own in views.values()))  # those with most to see come first
    by_sample = {run: _by_sample(own) for run, own in runs.items()}
    parts, labels = [], []
    for name in names:
        own_views = {run: views[run].get(name) for run in runs}
        parts.append(sample_data(name, {run: by_sample[run].get(name, []) for run in runs}, own_views))
        labels.append(label(name, list(own_views.values())))
    data = {
        "title": title,
        "runs": overview(runs, resamples, seed),
        "differences": differences(runs, resamples, seed),
        "samples": labels,
        "skipped": [{"sample": str(row["sample"]), "reason": str(row["reason"])} for row in skipped],
    }
    page = _page(title, data, parts)
    if path is None:
        return Report(page)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(str(target), page)
    return Report(page, target)


def _runs(records: Any) -> dict[str, list[Record]]:
    given = records if isinstance(records, Mapping) else {"": records}
    if not given:
        raise ValueError("records is empty: give a sweep's records.")
    runs = {}
    for name, own in given.items():
        where = f"records[{name!r}]" if isinstance(records, Mapping) else "records"
        if isinstance(own, (str, bytes)) or not isinstance(own, Iterable):
            raise ValueError(f"{where} is a {type(own).__name__}: give the list that layer_sweep returns.")
        runs[str(name)] = list(own)
        if not runs[str(name)]:
            raise ValueError(f"{where} is empty: there is nothing to show.")
        for at, record in enumerate(runs[str(name)]):
            missing = [column for column in COLUMNS if not isinstance(record, Mapping) or record.get(column) is None]
            if missing:
                raise ValueError(f"{where}: record {at} lacks {', '.join(missing)}: give layer_sweep's records.")
    return runs


def _views(samples: Any, runs: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, SampleView]]:
    if isinstance(samples, Mapping):
        unknown = [str(name) for name in samples if str(name) not in runs]
        if unknown:
            raise ValueError(f"samples holds {unknown[0]!r}, but records hold {', '.join(runs)}: use the same names.")
        given = {str(name): own for name, own in samples.items()}
    elif len(runs) == 1:
        given = dict.fromkeys(runs, samples)
    else:
        if samples := list(samples):
            raise ValueError(f"samples is one list, but records are of {', '.join(runs)}: give a list by each name.")
        given = {}
    found: dict[str, dict[str, SampleView]] = {run: {} for run in runs}
    for run, own in given.items():
        known = {str(record["sample"]) for record in runs[run]}
        for at, view in enumerate(own):
            if not isinstance(view, SampleView):
                raise ValueError(
                    f"samples[{at}] is a {type(view).__name__}: make a view of it, sample_view(model, processor, "
                    "sample, image, question)."
                )
            if view.name not in known:
                raise ValueError(f"samples[{at}] has the name {view.name!r}, which no record has.")
            if view.name in found[run]:
                raise ValueError(f"samples[{at}] has the name {view.name!r}, as an earlier one: leave one out.")
            found[run][view.name] = view
    return found


def _by_sample(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(str(record["sample"]), []).append(record)
    return found


def _page(title: str, data: dict[str, Any], parts: Sequence[dict[str, Any]]) -> str:
    assets = files(__package__) / "assets"
    style = (assets / "page.css").read_text(encoding="utf-8")
    script = "\n".join((assets / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    holes = {
        "title": html.escape(title),
        # Nothing but these two may style the page and run in it, whatever the data hold.
        "style-hash": _hash(style),
        "script-hash": _hash(script),
        "style": style,
        "script": script,
        "data": _data("data", data) + "".join(_data(f"sample-{at}", part) for at, part in enumerate(parts)),
    }
    template = (assets / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{([a-z-]+)\}\}", lambda hole: holes[hole[1]], template)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data(name: str, value: Any) -> str:
    """A data block that no text in it can end."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>\n'
