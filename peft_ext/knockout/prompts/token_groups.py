"""Token groups: which positions of a prompt are the image, the question, its options and objects, the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .patches import box_coverage, check_boxes, image_size, is_size, newline_tokens
from .phrases import locate
from .spans import OCCURRENCES, segments


# What the function can find, besides the names of the user's own spans.
GROUPS = (
    "image",
    "question",
    "last",
    "text",
    "newline",
    "true_option",
    "false_option",
    "options",
    "objects",
    "question_without_options",
    "question_without_objects",
    "related_patches",
    "other_patches",
)


def find_token_groups(
    processor: Any,
    inputs: Mapping[str, Any],
    image: Any = None,
    spans: Any = None,
    boxes: Any = None,
    *,
    box_format: str = "xywh",
    threshold: float | None = None,
    occurrence: str = "first",
    norms: Tensor | None = None,
    max_norm: float = 57.0,
    image_options: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """
    Find the groups of tokens between which information flows: image, text, last position, parts of the question, and
    patches of objects.

    Paper: Zhang et al., [Cross-modal Information Flow in Multimodal Large Language
    Models](https://arxiv.org/abs/2411.18620).

    Args:
        processor (`ProcessorMixin`):
            The processor that made the inputs; for text models, their tokenizer.
        inputs (`dict`):
            Output of the processor, with `input_ids` `[batch, sequence]`, padded on either side.
        image (`PIL.Image.Image`, array or `tuple[int, int]`, *optional*):
            The image or its `(width, height)`, or a list with one per row. Needed with `boxes`.
        spans (`dict[str, str | list[str]]`, *optional*):
            Phrases by the name of their group, or a list with one such dict per row. `true_option`, `false_option`,
            `options` and `objects` are searched inside the question, other names everywhere. Whole words are matched:
            as they are written, otherwise in another case, otherwise in a compatible spelling or as a plural in -s or
            -es. Of equal matches, those after the image come first. A part of the question avoids longer parts: in "Is
            it light blue or blue?" the option `blue` is the second one.
        boxes (`list`, *optional*):
            Boxes of the related objects, four numbers each in pixels of the image, or a list with one such list per
            row.
        box_format (`str`, *optional*, defaults to `"xywh"`):
            `"xywh"` (left, top, width, height) or `"xyxy"`.
        threshold (`float`, *optional*):
            A patch counts as related if the boxes cover more than this share of it. By default one covered pixel is
            enough.
        occurrence (`str`, *optional*, defaults to `"first"`):
            Which match to take if a phrase occurs several times: the `"first"`, as the published code does, or `"all"`
            that match as well as the best one.
        norms (`torch.Tensor`, *optional*):
            Norms of the patches, float `[batch, sequence]`, from [`image_token_norms`]. Patches above `max_norm` are
            then left out of the related and the other patches.
        max_norm (`float`, *optional*, defaults to 57):
            The threshold for `norms`. The default suits LLaVA-1.5.
        image_options (`dict`, *optional*):
            Options for images that the processor was called with, such as `do_pad=True`.

    Returns:
        `dict[str, torch.Tensor]`: Bool masks `[batch, sequence]` by name.

        - Always: `text` (neither image nor padding) and `last` (the last attended token).
        - If there are such tokens: `image` (with newlines) and `newline`.
        - The spans, and derived from them `options` (both), `question_without_options` and `question_without_objects`.
        - With `boxes`: `related_patches` and `other_patches`. With `norms`: `high_norm_patches`.

        A derived group that would be empty in some row is left out.

    Raises:
        `ValueError`: If an argument is malformed, a phrase or a box is not found, two phrases match the same tokens,
            or the processor's cropping removes a whole box. The message names the argument, the value and the remedy.
    """
    tokens = inputs.get("input_ids") if hasattr(inputs, "get") else None
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or 0 in tokens.shape:
        raise ValueError('inputs must hold input_ids [batch, sequence]: call the processor with return_tensors="pt".')
    attended = _attended(inputs, tokens)
    if occurrence not in OCCURRENCES:
        raise ValueError(f'occurrence is {occurrence!r}: must be "first" or "all".')
    if box_format not in ("xywh", "xyxy"):
        raise ValueError(f'box_format is {box_format!r}: must be "xywh" or "xyxy".')
    tokenizer = getattr(processor, "tokenizer", processor)
    visual = _visual(processor, tokenizer, tokens) & attended
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    last = (positions * attended).argmax(1, keepdim=True) == positions
    groups = {"text": attended & ~visual, "last": last}
    if visual.any():
        groups["image"] = visual
        newline = _newlines(processor, inputs, visual)
        if newline is not None and newline.any():
            groups["newline"] = newline
    if spans is not None:
        groups |= _span_groups(tokenizer, tokens, visual, attended, spans, occurrence)
    if boxes is not None:
        groups |= _patch_groups(processor, visual, image, boxes, box_format, threshold, image_options or {})
    elif image is not None and norms is None:
        _per_row(image, len(tokens), "image", is_size(image))
    if norms is not None:
        _leave_out_high_norms(groups, visual, norms, max_norm)
    return groups


def _attended(inputs: Mapping[str, Any], tokens: Tensor) -> Tensor:
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != tokens.shape:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask is {shape}, but input_ids are {tuple(tokens.shape)}: they must have one shape."
        )
    empty = (~mask.bool().any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"attention_mask is 0 everywhere in row(s) {empty}: there is no prompt to find groups in.")
    return mask.bool()


def _visual(processor: Any, tokenizer: Any, tokens: Tensor) -> Tensor:
    """Bool `[batch, sequence]`: the placeholders of image features."""
    # The plural first: Gemma 3's image_token_id is the mark before the image, not the placeholders of its features.
    several = getattr(processor, "image_token_ids", None)
    numbers = [number for number in several if number is not None] if isinstance(several, list) else []
    if not numbers and (number := getattr(processor, "image_token_id", None)) is not None:
        numbers = [number]
    if not numbers and (number := getattr(tokenizer, "image_token_id", None)) is not None:
        numbers = [number]
    name = getattr(processor, "image_token", None)
    if not numbers and isinstance(name, str):
        number = tokenizer.convert_tokens_to_ids(name)
        # A tokenizer that has no such token gives the one for unknown words.
        numbers = [number] if tokenizer.convert_ids_to_tokens(number) == name else []
    return torch.isin(tokens, torch.tensor(numbers, dtype=tokens.dtype, device=tokens.device))


def _newlines(processor: Any, inputs: Mapping[str, Any], visual: Tensor) -> Tensor | None:
    sizes = inputs.get("image_sizes")
    if not isinstance(sizes, Tensor) or len(sizes) != len(visual) or not bool(visual.any(1).all()):
        return None
    found = torch.zeros_like(visual)
    for row, (height, width) in enumerate(sizes.tolist()):
        newline = newline_tokens(processor, int(height), int(width), int(visual[row].sum()))
        if newline is None:
            return None
        found[row, visual[row]] = newline.to(found.device)
    return found


def _per_row(value: Any, batch: int, name: str, single: bool) -> list[Any]:
    """One entry per row; `single` says whether the value is one row's entry."""
    if isinstance(value, (list, tuple)) and not single:
        if len(value) != batch:
            raise ValueError(
                f"{name} holds {len(value)} entries, but the inputs have {batch} row(s): give one per row."
            )
        return list(value)
    if batch != 1 and name != "spans":
        raise ValueError(f"{name} is for one row, but the inputs have {batch}: give a list with one entry per row.")
    return [value] * batch


def _span_groups(
    tokenizer: Any, tokens: Tensor, visual: Tensor, attended: Tensor, spans: Any, occurrence: str
) -> dict[str, Tensor]:
    rows = _per_row(spans, len(tokens), "spans", False)
    for row in rows:
        if not isinstance(row, Mapping) or not row:
            raise ValueError(
                f'spans must be a dict such as {{"question": "What is it?"}}, or one per row, but is {spans!r}.'
            )
    names = list(rows[0])
    if any(set(row) != set(names) for row in rows):
        raise ValueError(f"spans must have the same names in each row, but has {[list(row) for row in rows]}.")
    found = {name: torch.zeros_like(visual) for name in names}
    for number, row in enumerate(rows):
        text = segments(tokenizer, tokens[number].tolist(), (attended & ~visual)[number].tolist())
        after = int(visual[number].nonzero()[-1]) if visual[number].any() else -1
        # Of equal matches the one after the image, since a template before it may hold the same words.
        text.sort(key=lambda segment: segment.owners[0][0] < after)
        for name, where in locate(text, row, number, occurrence).items():
            found[name][number, where] = True
    options = [found[name] for name in ("true_option", "false_option") if name in found]
    if options and "options" not in found:
        found["options"] = torch.stack(options).any(0)
    for part in ("options", "objects"):
        rest = found["question"] & ~found[part] if "question" in found and part in found else None
        if rest is not None and bool(rest.any(1).all()):
            found[f"question_without_{part}"] = rest
    return found


def _patch_groups(
    processor: Any,
    visual: Tensor,
    image: Any,
    boxes: Any,
    box_format: str,
    threshold: float | None,
    options: Mapping[str, Any],
) -> dict[str, Tensor]:
    batch = len(visual)
    if image is None:
        raise ValueError("boxes are in the image's pixels: pass the image too, or its (width, height).")
    if threshold is not None and (isinstance(threshold, bool) or not 0 <= threshold < 1):
        raise ValueError(f"threshold is {threshold!r}: must be a share of a patch, at least 0 and less than 1.")
    if not hasattr(processor, "image_processor"):
        raise ValueError(
            f"boxes need a processor with an image_processor, but processor is a {type(processor).__name__}."
        )
    images = _per_row(image, batch, "image", is_size(image))
    nested = isinstance(boxes, Sequence) and boxes and isinstance(boxes[0], Sequence) and len(boxes[0]) > 0
    nested = nested and isinstance(boxes[0][0], (Sequence, Tensor))
    given = _per_row(boxes, batch, "boxes", not nested)
    related, other = torch.zeros_like(visual), torch.zeros_like(visual)
    for row in range(batch):
        tokens = int(visual[row].sum())
        if tokens == 0:
            raise ValueError(f"boxes: row {row} of the inputs has no image tokens.")
        size = image_size(images[row])
        name = f"boxes[{row}]" if batch > 1 else "boxes"
        coverage = box_coverage(processor, size, check_boxes(given[row], size, box_format, name), tokens, options)
        hit = coverage.peak >= 0.5 if threshold is None else coverage.share > threshold
        if not (hit & coverage.place).any():
            raise ValueError(
                f"{name}: nothing of {given[row]} is left in the image tokens, since the processor crops the image, "
                "or the boxes are thinner than its pixels; pad instead of cropping (do_pad=True, "
                "do_center_crop=False), lower the threshold, or leave this sample out."
            )
        related[row, visual[row]] = (hit & coverage.place).to(related.device)
        other[row, visual[row]] = (~hit & coverage.place).to(other.device)
    found = {"related_patches": related}
    if bool(other.any(1).all()):
        found["other_patches"] = other
    return found


def _leave_out_high_norms(groups: dict[str, Tensor], visual: Tensor, norms: Tensor, max_norm: float) -> None:
    if not isinstance(norms, Tensor) or norms.shape != visual.shape or not norms.is_floating_point():
        raise ValueError(
            f"norms must be floats [batch, sequence] of shape {tuple(visual.shape)}: see image_token_norms."
        )
    high = visual & (norms.to(visual.device) > max_norm)
    if high.any():
        groups["high_norm_patches"] = high
    for name in ("related_patches", "other_patches"):
        if name in groups:
            groups[name] = groups[name] & ~high
            if not bool(groups[name].any(1).all()):
                raise ValueError(f"max_norm={max_norm} leaves no token of {name} in some row: raise it.")
