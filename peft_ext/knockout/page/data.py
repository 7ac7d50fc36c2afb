"""A page's data: the means of all samples, and each sample by itself, as JSON that is read when it is looked at."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..plots import summarise
from ..prompts.images import open_image
from ..prompts.spans import consecutive_runs
from ..sweep.records import Record
from .pictures import data_uri, shrunk
from .views import Effects, SampleView


COLUMNS = ("sample", "pair", "layer", "change_percent")
SETTINGS = ("window", "mode", "answer_token", "engine")
# The largest number of a half-precision float, less a little.
_LARGEST = 65_000.0


def overview(runs: Mapping[str, Sequence[Record]], resamples: int, seed: int) -> list[dict[str, Any]]:
    """By run: the curves of all samples, and the settings that its records share."""
    found = []
    for name, records in runs.items():
        settings = {key: sorted({str(record[key]) for record in records if key in record}) for key in SETTINGS}
        found.append(
            {
                "name": name,
                "curves": _curves(records, resamples, seed),
                "settings": {key: ", ".join(values) for key, values in settings.items() if values},
            }
        )
    return found


def differences(runs: Mapping[str, Sequence[Record]], resamples: int, seed: int) -> list[dict[str, Any]]:
    """Curves of the difference between two runs: the second one's change minus the first one's, sample by sample."""
    if len(runs) != 2:
        return []
    before, after = (
        {(record["sample"], record["pair"], record["layer"]): record["change_percent"] for record in own}
        for own in runs.values()
    )
    keys = [key for key in after if key in before]
    rows = [
        {"sample": sample, "pair": pair, "layer": layer, "change_percent": after[key] - before[key]}
        for key in keys
        for sample, pair, layer in [key]
    ]
    return _curves(rows, resamples, seed) if rows else []


def _curves(records: Sequence[Record], resamples: int, seed: int) -> list[dict[str, Any]]:
    curves: dict[str, dict[str, Any]] = {}
    for row in summarise(records, "change_percent", "pair", resamples, seed):
        own = curves.setdefault(
            row["pair"],
            {"pair": row["pair"], "samples": row["samples"], "layers": [], "mean": [], "low": [], "high": []},
        )
        own["layers"].append(row["layer"])
        for key in ("mean", "low", "high"):
            own[key].append(_number(row[key]))
    return list(curves.values())


def sample_data(
    name: str, records: Mapping[str, Sequence[Record]], views: Mapping[str, SampleView | None]
) -> dict[str, Any]:
    """One sample: what its runs share, and each run's own."""
    picture, problems = _picture(views.values())
    shown = [view for view in views.values() if view is not None]
    return {
        "name": name,
        "question": next((view.question for view in shown if view.question), ""),
        "image": picture,
        "problems": list(dict.fromkeys(problems + [view.problem for view in shown if view.problem])),
        "runs": [_run(records[run], views[run]) for run in records],
    }


def label(name: str, views: Sequence[SampleView | None]) -> str:
    """Name of a sample in the list."""
    question = next((view.question for view in views if view is not None and view.question), "")
    short = question if len(question) <= 80 else question[:79] + "…"
    return f"{name} · {short}" if short else name


def _picture(views: Any) -> tuple[dict[str, Any] | None, list[str]]:
    problems: list[str] = []
    for view in views:
        if view is None or view.image is None:
            continue
        try:
            picture = shrunk(open_image(view.image))
            return {"src": data_uri(picture), "width": picture.width, "height": picture.height}, problems
        except (ValueError, ImportError) as error:
            problems.append(str(error))
    return None, problems


def _run(records: Sequence[Record], view: SampleView | None) -> dict[str, Any]:
    curves: dict[str, dict[str, Any]] = {}
    for record in sorted(records, key=lambda record: record["layer"]):
        own = curves.setdefault(record["pair"], {"pair": record["pair"], "layers": [], "mean": []})
        own["layers"].append(record["layer"])
        own["mean"].append(_number(record["change_percent"]))
    data: dict[str, Any] = {"curves": list(curves.values())}
    if records and "base_probability" in records[0]:
        data["base"] = _number(records[0]["base_probability"])
    if view is None:
        return data
    data |= {
        "answer": view.answer,
        "pieces": [[piece.text, piece.positions if piece.text else len(piece.positions)] for piece in view.pieces],
        "groups": {name: _ranges(positions) for name, positions in view.groups.items()},
        "patches": _ranges(view.patches),
        # ten-thousandths of the image's sides
        "places": [None if place is None else [round(1e4 * side) for side in place] for place in view.places],
        "lmar": [_number(value) for value in view.lmar],
        "effects": [_effects(effects) for effects in view.effects],
    }
    if view.attention is not None:
        data["attention"] = {"tokens": view.attention.shape[1], "values": _halves(view.attention)}
    if view.lens is not None:
        data["lens"] = {
            "answer": view.lens.answer,
            "probability": [_number(value) for value in view.lens.probability],
            "words": [[[word, _number(value)] for word, value in layer] for layer in view.lens.words],
        }
    return data


def _effects(effects: Effects) -> dict[str, Any]:
    units = [_ranges(positions) for positions in effects.units]
    return vars(effects) | {"units": units, "change": _halves(effects.change.T)}  # layer by layer


def _number(value: float) -> float | None:
    """With six digits; JSON has no infinity."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _ranges(positions: Sequence[int]) -> list[list[int]]:
    """Sorted positions as first and last of each run."""
    return [[run[0], run[-1]] for run in consecutive_runs(positions)]


def _halves(values: np.ndarray) -> str:
    """Half-precision floats, little-endian, in base 64: three digits in 2.7 characters."""
    clipped = np.clip(np.nan_to_num(values, nan=0.0), -_LARGEST, _LARGEST)
    return base64.b64encode(np.ascontiguousarray(clipped, dtype="<f2").tobytes()).decode()
