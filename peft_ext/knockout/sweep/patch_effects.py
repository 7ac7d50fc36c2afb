"""Effects on the answer of hiding single image patches, or single words, from a target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..cut.edges import check_mask
from ..model.architecture import Architecture, inspect_model
from ..prompts.image_tokens import image_tokens
from ..prompts.samples import FlowSample, last_positions, prepare
from ..prompts.spans import segments
from .records import Record
from .sweep import Sweep, device_of
from .windows import Window, windows


def patch_effects(
    model: nn.Module,
    inputs: Mapping[str, Any] | FlowSample,
    target: str | Tensor = "last",
    *,
    sources: str | Mapping[str, Tensor] = "patches",
    groups: Mapping[str, Tensor] | None = None,
    processor: Any = None,
    block: int = 1,
    grid: tuple[int, int] | None = None,
    window: int | None = None,
    mode: str = "centred",
    layers: Sequence[int] | None = None,
    answer_ids: Sequence[Sequence[int]] | None = None,
    answer_token: str | int = "first",
    engine: str = "auto",
    self_check: bool = True,
) -> list[Record]:
    """
    Hide each image patch (or block of patches, or word) from a target, and measure how the probability of the answer
    changes. The result is a heat map over the image that is measured, not read off the attention.

    All passes share one clean pass and run packed into few sequences, as in [`layer_sweep`]. They are exact.

    Args:
        model (`torch.nn.Module`):
            A decoder of transformers, in eval mode.
        inputs (`dict` or [`FlowSample`]):
            Arguments of the model, with `input_ids` `[batch, sequence]`. A sample brings its own groups, answers and
            names.
        target (`str` or `torch.Tensor`, *optional*, defaults to `"last"`):
            The tokens that may not attend to the patches: the name of a group, `"last"` (the last attended token), or
            a bool mask `[batch, sequence]`.
        sources (`str` or `dict[str, torch.Tensor]`, *optional*, defaults to `"patches"`):
            What is hidden, one after the other. `"patches"`: the image tokens. `"words"`: the words of
            `groups["question"]`, or otherwise of all text after the image. Or bool masks `[batch, sequence]` by name.
        groups (`dict[str, torch.Tensor]`, *optional*):
            Token groups, as [`find_token_groups`] returns them. If they have no `image`, the image tokens are those of
            the model's config.
        processor (`ProcessorMixin`, *optional*):
            Needed for words.
        block (`int`, *optional*, defaults to 1):
            Number of patches per side that are hidden together.
        grid (`tuple[int, int]`, *optional*):
            Rows and columns of patches; by default a square, if there is one.
        window (`int`, *optional*):
            Number of layers that are blocked together around each layer. By default all layers at once, which gives
            one number per patch.
        mode (`str`, *optional*, defaults to `"centred"`):
            With a window, as in [`layer_sweep`].
        layers (`Sequence[int]`, *optional*):
            With a window, as in [`layer_sweep`].
        answer_ids (`list[list[int]]`, *optional*):
            As in [`FlowSample`]. By default the model's most probable token.
        answer_token (`str` or `int`, *optional*, defaults to `"first"`):
            As in [`layer_sweep`].
        engine (`str`, *optional*, defaults to `"auto"`):
            As in [`layer_sweep`]; `"full"` is the naive loop.
        self_check (`bool`, *optional*, defaults to `True`):
            Whether to compare the largest changes with the full engine's.

    Returns:
        `list[dict]`: One record per row, source and layer, with the columns of [`layer_sweep`]. `source` is
        `"patch 0"` and so on, in the order of the image tokens; `unit` is that number; `positions` are the source's
        tokens in `input_ids`. Blocks of a grid have `row` and `column`, words their `text`. `layer` and `window` are
        `None` if all layers are blocked.

    Raises:
        `ValueError`: If an argument is malformed, or there is no patch, word or target.
    """
    sample = inputs if isinstance(inputs, FlowSample) else FlowSample(inputs, groups or {}, answer_ids)
    if isinstance(inputs, FlowSample) and (groups is not None or answer_ids is not None):
        raise ValueError("groups and answer_ids are the FlowSample's own: leave them out.")
    architecture = inspect_model(model)
    layer_windows = _windows(architecture, window, mode, layers)
    tokens = sample.inputs.get("input_ids")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or 0 in tokens.shape:
        raise ValueError("inputs must hold input_ids [batch, sequence], as the processor makes them.")
    units = _units(sample, sources, architecture.model.config, processor, block, grid)
    name, mask = _target(sample, target)
    if name in units:
        raise ValueError(f"sources holds {name!r}, which is the target's name: give it another one.")
    masks = {unit: unit_mask for unit, (unit_mask, _) in units.items()}
    named = replace(sample, groups={**masks, name: mask})
    pairs = [(unit, name) for unit in units]
    settings = {"window": window, "mode": mode, "answer_token": answer_token}
    sweep = Sweep(model, architecture, pairs, layer_windows, settings, engine, self_check)
    prompt = prepare(named, pairs, answer_token, 0, device_of(model))
    records = sweep.run(prompt, named)
    rows = {row_name: number for number, row_name in enumerate(prompt.names)}
    for record in records:
        unit_mask, columns = units[record["source"]]
        record["positions"] = unit_mask[rows[record["sample"]]].nonzero().flatten().tolist()
        record |= columns
        if window is None:
            record["layer"] = None
    return records


def _windows(architecture: Architecture, window: int | None, mode: str, layers: Sequence[int] | None) -> list[Window]:
    total = len(architecture.layers)
    if window is not None:
        all_windows = windows(total, window, mode)
        return all_windows if layers is None else [all_windows[at] for at in architecture.check_layers(layers)]
    if layers is not None:
        raise ValueError(f"layers is {layers!r}, but without a window all layers are blocked at once: give a window.")
    return [Window(0, 0, total)]


def _target(sample: FlowSample, target: str | Tensor) -> tuple[str, Tensor]:
    if isinstance(target, Tensor):
        return "target", check_mask(target, "target")
    if target in sample.groups:
        return target, check_mask(sample.groups[target], f"groups[{target!r}]")
    if target != "last":
        known = ", ".join(["last", *sample.groups])
        raise ValueError(f"target is {target!r}, which groups do not hold: give one of {known}, or a mask.")
    tokens = sample.inputs["input_ids"]
    at = last_positions(sample.inputs).to(tokens.device)
    return "last", torch.arange(tokens.shape[1], device=tokens.device) == at[:, None]


def _units(
    sample: FlowSample,
    sources: str | Mapping[str, Tensor],
    config: Any,
    processor: Any,
    block: int,
    grid: tuple[int, int] | None,
) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """By its name what is blocked, bool `[batch, sequence]`, and its columns in the results."""
    if isinstance(sources, Mapping):
        if not sources:
            raise ValueError("sources is empty: give at least one mask.")
        return {name: (mask, {"unit": at}) for at, (name, mask) in enumerate(sources.items())}
    if sources == "patches":
        return _patches(image_tokens(sample, config), block, grid)
    if sources != "words":
        raise ValueError(f'sources is {sources!r}: must be "patches", "words", or masks by name.')
    if processor is None:
        raise ValueError('sources="words" needs the processor, which tells the words of the tokens.')
    if len(sample.inputs["input_ids"]) != 1:
        raise ValueError('sources="words": rows have different words; make batches of one.')
    words = words_of(processor, sample, config)
    return {f"word {at}": (mask, {"unit": at, "text": text}) for at, (text, mask) in enumerate(words)}


def _patches(image: Tensor, block: int, grid: tuple[int, int] | None) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"block is {block!r}: must be a whole number of patches per side, at least 1.")
    counts = image.sum(1).tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"inputs: the rows have {counts} image tokens; make batches of one.")
    order = image.cumsum(1) - 1  # [batch, sequence]: a patch's number
    side = math.isqrt(counts[0])
    rows, columns = grid or (side, side)
    if rows * columns != counts[0]:
        if grid is not None or block > 1:
            raise ValueError(
                f"grid: {rows} x {columns} patches are not the {counts[0]} image tokens; give grid=(rows, columns), "
                "and name newline tokens in groups['newline']."
            )
        return {f"patch {at}": (image & (order == at), {"unit": at}) for at in range(counts[0])}
    across = -(-columns // block)
    units: dict[str, tuple[Tensor, dict[str, Any]]] = {}
    cell = order // columns // block * across + order % columns // block
    for at in range(-(-rows // block) * across):
        place = {"unit": at, "row": at // across, "column": at % across}
        units[f"patch {at}" if block == 1 else f"block {at}"] = image & (cell == at), place
    return units


def words_of(processor: Any, sample: FlowSample, config: Any) -> list[tuple[str, Tensor]]:
    """
    The words of a sample's question, or of all text after the image, and their tokens, bool `[1, sequence]`. Where
    text has no spaces a word is what its tokens are. Raises `ValueError` if there is none.
    """
    tokens = sample.inputs["input_ids"]
    within = sample.groups.get("question")
    if within is None:
        image = image_tokens(sample, config)[0]
        within = (torch.arange(tokens.shape[1], device=tokens.device) > image.nonzero().max())[None]
    kept = within[0].tolist()
    words: list[tuple[str, list[int]]] = []
    for segment in segments(getattr(processor, "tokenizer", processor), tokens[0].tolist(), kept):
        joined = False
        for character, owners in zip(segment.text, segment.owners, strict=True):
            if character.isspace():
                joined = False
            elif words and (set(owners) & set(words[-1][1]) or (joined and ord(character) < _UNSPACED)):
                text, own = words[-1]
                words[-1] = text + character, own + [at for at in owners if at not in own]
                joined = True
            else:
                words.append((character, list(owners)))
                joined = True
    if not words:
        raise ValueError("inputs: there is no word after the image; give groups with the question in them.")
    at = torch.arange(tokens.shape[1], device=tokens.device)
    return [(text, torch.isin(at, torch.tensor(own, device=at.device))[None]) for text, own in words]


# From here on scripts are written without spaces, but for Korean, whose words are then its tokens too.
_UNSPACED = 0x2E80
