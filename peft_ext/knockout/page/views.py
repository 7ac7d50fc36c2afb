"""View of one sample on a page: its picture, its prompt in pieces, and the model's measurements on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ..model.architecture import inspect_model
from ..prompts.image_tokens import image_tokens
from ..prompts.images import open_image
from ..prompts.patches import patch_places
from ..prompts.samples import FlowSample, prepare
from ..sweep.patch_effects import patch_effects
from ..sweep.records import Record
from ..sweep.sweep import device_of
from .pictures import shrunk
from .readouts import Lens, last_attention, top_words
from .text import Piece, pieces_of


@dataclass
class Effects:
    """
    What the answer loses when each unit is hidden from a target.

    Attributes:
        kind (`str`): `"patch"` or `"word"`.
        target (`str`): the group that may not attend to the units.
        layers (`list[int]`): that the columns are for; empty if all layers are blocked at once.
        units (`list[list[int]]`): positions of each unit in the prompt.
        change (`numpy.ndarray`): float32 `[units, layers or 1]`, in percent.
    """

    kind: str
    target: str
    layers: list[int]
    units: list[list[int]]
    change: np.ndarray


@dataclass
class SampleView:
    """
    One sample of a page, made by [`sample_view`]. Without a model you can make one from a name and whatever else you
    know.

    Attributes:
        name (`str`):
            Name of the sample in the records.
        question (`str`):
            The question.
        answer (`str`):
            The model's answer.
        image (`Any`):
            A PIL image, a path, or `{"bytes": …}`; `None` if there is none.
        problem (`str`):
            Why something is missing; empty if nothing is.
        pieces (`list[Piece]`):
            The prompt.
        groups (`dict[str, list[int]]`):
            Positions of each token group.
        patches (`list[int]`):
            Positions of the image's patches.
        places (`list[list[float] | None]`):
            Left, top, right and bottom of each patch, as shares of the image.
        attention (`numpy.ndarray`, *optional*):
            Attention of the token that decides the answer, mean over heads, float32 `[layers, tokens]`.
        lmar (`list[float]`):
            LMAR by layer, see [`lmar`]; empty without an image.
        lens ([`Lens`], *optional*):
            The answer and the most probable words after each layer.
        effects (`list[Effects]`):
            Effects of patches and words.
    """

    name: str
    question: str = ""
    answer: str = ""
    image: Any = None
    problem: str = ""
    pieces: list[Piece] = field(default_factory=list)
    groups: dict[str, list[int]] = field(default_factory=dict)
    patches: list[int] = field(default_factory=list)
    places: list[list[float] | None] = field(default_factory=list)
    attention: np.ndarray | None = None
    lmar: list[float] = field(default_factory=list)
    lens: Lens | None = None
    effects: list[Effects] = field(default_factory=list)


@torch.no_grad()
def sample_view(
    model: nn.Module,
    processor: Any,
    sample: FlowSample,
    image: Any = None,
    question: str = "",
    *,
    targets: Sequence[str] = ("last",),
    window: int | None = None,
    mode: str = "centred",
    block: int = 1,
    words: bool = True,
    answer_token: str | int = "first",
    norm: bool = True,
    top: int = 5,
    image_options: Mapping[str, Any] | None = None,
    self_check: bool = True,
) -> SampleView:
    """
    Measure what [`report`] shows of a sample.

    Args:
        model (`torch.nn.Module`):
            The model that the sample was made for.
        processor (`ProcessorMixin`):
            Its processor; for text models, the tokenizer.
        sample ([`FlowSample`]):
            A batch of one.
        image (`Any`, *optional*):
            The picture: a PIL image, a path, or `{"bytes": …}`. If it cannot be read, the page names it, and the rest
            is measured all the same.
        question (`str`, *optional*):
            The question as text.
        targets (`Sequence[str]`, *optional*, defaults to `("last",)`):
            Groups from which each patch is hidden, see [`patch_effects`]. The last token costs about as much as a few
            forward passes, a question of n tokens n times that. `()` measures none.
        window (`int`, *optional*):
            As for [`patch_effects`].
        mode (`str`, *optional*, defaults to `"centred"`):
            As for [`patch_effects`].
        block (`int`, *optional*, defaults to 1):
            As for [`patch_effects`].
        words (`bool`, *optional*, defaults to `True`):
            Whether to hide the question's words from the targets, too.
        answer_token (`str` or `int`, *optional*, defaults to `"first"`):
            As for [`layer_sweep`].
        norm (`bool`, *optional*, defaults to `True`):
            Whether to read the answer by layer through the final norm.
        top (`int`, *optional*, defaults to 5):
            Number of words per layer.
        image_options (`dict`, *optional*):
            Options for images that the processor was called with, such as `do_pad=True`.
        self_check (`bool`, *optional*, defaults to `True`):
            As for [`patch_effects`]. For many samples of one kind, checking the first is enough.

    Raises:
        `ValueError`: If the batch has several rows, or the measurements refuse an argument.
    """
    if len(sample.inputs["input_ids"]) != 1:
        raise ValueError(f"sample holds {len(sample.inputs['input_ids'])} rows: make a view of each by itself.")
    if model.training:
        raise ValueError("model is in training mode, where dropout changes every pass: call model.eval() first.")
    prompt = prepare(sample, [], answer_token, 0, device_of(model))
    tokenizer = getattr(processor, "tokenizer", processor)
    view = SampleView(prompt.names[0], question, image=image)
    view.groups = {name: mask[0].nonzero().flatten().tolist() for name, mask in sample.groups.items()}
    view.patches = _patches(model, sample)
    view.pieces = pieces_of(tokenizer, sample, view.patches)
    view.lens = top_words(model, tokenizer, prompt, norm, top)
    view.answer = str(sample.info.get("answer", view.lens.answer))
    view.attention, view.lmar = last_attention(model, prompt, bool(view.patches))
    if view.patches:
        _place(view, processor, dict(image_options or {}))
    measure = partial(
        patch_effects, model, sample, window=window, mode=mode, answer_token=answer_token, self_check=self_check
    )
    for target in targets:
        if view.patches:
            grid = _grid(view) if block > 1 else None
            view.effects.append(_effects("patch", target, measure(target, block=block, grid=grid)))
        if words and "question" in sample.groups:
            found = measure(target, sources="words", processor=processor)
            view.effects.append(_effects("word", target, found))
    return view


def _patches(model: nn.Module, sample: FlowSample) -> list[int]:
    try:
        return image_tokens(sample, inspect_model(model).model.config)[0].nonzero().flatten().tolist()
    except ValueError:  # a text model, or a prompt without an image
        return []


def _place(view: SampleView, processor: Any, options: dict[str, Any]) -> None:
    """Fill in the places of the patches in the picture, or the reason why they are not known."""
    if view.image is None:
        view.problem = "no image was given"
        return
    try:
        picture = open_image(view.image)
    except ValueError as error:
        view.image, view.problem = None, str(error)
        return
    view.image = shrunk(picture)  # many views are kept at a time
    image = view.groups.get("image", view.patches)
    try:
        places = patch_places(processor, picture.size, len(image), options).tolist()
    except Exception as error:  # processors raise various things; the rest of the page does not depend on it
        view.problem = f"the patches' places in the image are not known: {error}"
        return
    own = dict(zip(image, places, strict=True))
    view.places = [None if math.isnan(own[at][0]) else own[at] for at in view.patches]


def _effects(kind: str, target: str, records: Sequence[Record]) -> Effects:
    layers = [layer for layer in dict.fromkeys(record["layer"] for record in records) if layer is not None]
    units: dict[int, list[int]] = {record["unit"]: record["positions"] for record in records}
    change = np.zeros((len(units), max(len(layers), 1)), dtype=np.float32)
    at = {layer: column for column, layer in enumerate(layers)}
    for record in records:
        change[record["unit"], at.get(record["layer"], 0)] = record["change_percent"]
    return Effects(kind, target, layers, list(units.values()), change)


def _grid(view: SampleView) -> tuple[int, int] | None:
    """Rows and columns of the patches, where their places are those of one grid, row by row."""
    places = [place for place in view.places if place is not None]
    if not places or len(places) != len(view.patches):
        return None
    middle = (places[0][1] + places[0][3]) / 2
    columns = sum(place[1] < middle for place in places)  # the first row
    return (len(places) // columns, columns) if len(places) % columns == 0 else None
