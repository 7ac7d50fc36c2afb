"""Samples of a sweep: inputs with their token groups and answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..cut.edges import Edges, check_mask, check_pairs


# What a sweep says of each sample itself.
COLUMNS = (
    "sample",
    "pair",
    "source",
    "target",
    "layer",
    "window_start",
    "window_end",
    "answer_id",
    "base_probability",
    "probability",
    "change_percent",
    "engine",
    "window",
    "mode",
    "answer_token",
)


@dataclass
class FlowSample:
    """
    A batch of prompts, often of one, for [`layer_sweep`].

    Args:
        inputs (`dict`):
            Arguments of the model, as the processor returns them.
        groups (`dict[str, torch.Tensor]`):
            Token groups, bool `[batch, sequence]`, as [`find_token_groups`] returns them.
        answer_ids (`list[list[int]]`, *optional*):
            Tokens of the answer of each row. By default the answer is the token that the model finds most probable, as
            in the paper.
        names (`list[str]`, *optional*):
            Names of the rows, unique in a data set. They fill the column `sample` of the results.
        info (`dict`, *optional*):
            Further columns of the results, such as the task.
    """

    inputs: Mapping[str, Any]
    groups: Mapping[str, Tensor]
    answer_ids: Sequence[Sequence[int]] | None = None
    names: Sequence[str] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class LazySample:
    """
    A sample that is made only when it is needed. It is not made if another process runs it, or if its results are in
    the output file already.

    Args:
        name (`str`):
            Name of the sample in the results.
        make (`Callable`):
            Returns the [`FlowSample`], or `None` to leave it out.
    """

    name: str
    make: Callable[[], FlowSample | None]


@dataclass
class Prompt:
    """A sample ready to run."""

    inputs: dict[str, Any]  # on the model's device, with the answer's tokens before the one that is read
    edges: dict[tuple[str, str], Edges]  # by (source, target)
    readout: Tensor  # int64 `[batch]`, the position that predicts the answer's token
    answer: Tensor | None  # int64 `[batch]`, that token; `None` for the model's own choice
    answer_tokens: int  # the answer's tokens in the inputs
    names: list[str]  # of the rows


def parse_pairs(pairs: Any) -> list[tuple[str, str]]:
    """
    Names of groups from `"image:question"` or `("image", "question")`.

    Raises:
        `ValueError`: if there is none, one is malformed or comes twice.
    """
    if isinstance(pairs, str):
        pairs = pairs.split(",")
    if not isinstance(pairs, Sequence) or not pairs:
        raise ValueError(f'pairs must be a list such as ["image:question", "question:last"], but is {pairs!r}.')
    parsed: list[tuple[str, str]] = []
    for pair in pairs:
        parts = tuple(pair.split(":")) if isinstance(pair, str) else tuple(pair) if isinstance(pair, Sequence) else ()
        if len(parts) != 2 or not all(isinstance(part, str) and part.strip() for part in parts):
            raise ValueError(f'pairs holds {pair!r}: write "source:target", such as "image:question".')
        named = (parts[0].strip(), parts[1].strip())
        if named in parsed:
            raise ValueError(f"pairs holds {pair!r} twice.")
        parsed.append(named)
    return parsed


def prepare(
    sample: FlowSample, pairs: Sequence[tuple[str, str]], answer_token: str | int, number: int, device: torch.device
) -> Prompt:
    """
    Check a sample and put its answer's earlier tokens behind the prompt.

    Raises:
        `ValueError`: naming the sample, the argument, the value and the remedy.
    """
    tokens = sample.inputs.get("input_ids")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or 0 in tokens.shape:
        raise ValueError(
            f"sample {number}: inputs must hold input_ids [batch, sequence], as the processor makes them."
        )
    batch = len(tokens)
    own = [str(number)] if batch == 1 else [f"{number}.{row}" for row in range(batch)]
    names = own if sample.names is None else [str(name) for name in sample.names]
    if len(names) != batch or len(set(names)) != batch:
        raise ValueError(f"sample {number}: names must be {batch} different names, one per row, but is {names}.")
    label = f"sample {names[0]}"
    taken = [column for column in sample.info if column in COLUMNS]
    if taken:
        raise ValueError(f"{label}: info holds {taken[0]!r}, a column of the results: rename it.")
    edges = {}
    for pair in pairs:
        for group in pair:
            if group not in sample.groups:
                known = ", ".join(sample.groups) or "none"
                raise ValueError(f"pairs: {label} has no group {group!r}; it has {known}.")
            mask = check_mask(sample.groups[group], f"{label}: group {group!r}")
            if mask.shape != tokens.shape:
                raise ValueError(
                    f"{label}: group {group!r} has the shape {tuple(mask.shape)}, but input_ids have "
                    f"{tuple(tokens.shape)}: find the groups in the same inputs."
                )
        edges[pair] = check_pairs([(sample.groups[pair[0]], sample.groups[pair[1]])])[0]
    answer, before = _answer(sample, answer_token, batch, label)
    inputs = dict(sample.inputs)
    readout = last_positions(inputs)
    if before is not None:
        if not bool((readout == tokens.shape[1] - 1).all()):
            raise ValueError(
                f"{label}: answer_token={answer_token!r} needs the prompt's end at the end of each row; set the "
                'tokenizer\'s padding_side to "left", or make batches of one.'
            )
        inputs = extend_inputs(inputs, before)
        readout = readout + before.shape[1]
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    return Prompt(inputs, edges, readout, answer, 0 if before is None else before.shape[1], names)


def last_positions(inputs: Mapping[str, Any]) -> Tensor:
    """The last attended position of each row, int64 `[batch]`."""
    tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None:
        return torch.full((len(tokens),), tokens.shape[1] - 1)
    if mask.shape != tokens.shape:
        raise ValueError(
            f"attention_mask has the shape {tuple(mask.shape)}, but input_ids have {tuple(tokens.shape)}: "
            "pass the processor's two-dimensional mask."
        )
    positions = torch.arange(tokens.shape[1], device=mask.device) * mask.bool()
    return positions.argmax(1).cpu()


def _answer(sample: FlowSample, which: str | int, batch: int, label: str) -> tuple[Tensor | None, Tensor | None]:
    """The token to read, `[batch]`, and those before it, `[batch, tokens]`."""
    if which not in ("first", "last") and (isinstance(which, bool) or not isinstance(which, int)):
        raise ValueError(f'answer_token is {which!r}: must be "first", "last" or a number counted from 0.')
    if sample.answer_ids is None:
        if which not in ("first", 0):
            raise ValueError(f"{label}: answer_token={which!r} needs answer_ids, the answer's tokens.")
        return None, None
    answers = [list(map(int, row)) for row in sample.answer_ids]
    if len(answers) != batch or not all(answers):
        raise ValueError(f"{label}: answer_ids must hold {batch} non-empty lists of tokens, but is {answers}.")
    at = [0 if which == "first" else len(row) - 1 if which == "last" else int(which) for row in answers]
    for row, index in zip(answers, at, strict=True):
        if not 0 <= index < len(row):
            raise ValueError(f"{label}: answer_token is {which}, but the answer has {len(row)} token(s).")
    if len(set(at)) > 1:
        raise ValueError(f"{label}: its answers' last tokens are at {at}; make batches of one.")
    token = torch.tensor([row[at[0]] for row in answers])
    return token, torch.tensor([row[: at[0]] for row in answers]) if at[0] else None


def extend_inputs(inputs: Mapping[str, Any], tokens: Tensor) -> dict[str, Any]:
    """
    Inputs with more tokens, int64 `[batch, tokens]`, at the end.

    Raises:
        `ValueError`: for inputs of which it cannot be told how they continue.
    """
    ids = inputs["input_ids"]
    fill = {"attention_mask": 1, "mm_token_type_ids": 0}
    extended = dict(inputs)
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.shape[:2] != ids.shape or name == "input_ids":
            continue
        if name == "token_type_ids":
            # PaliGemma's prompt is all 0 (or 0 with 1 after it) and attends both ways; what follows it is causal.
            filler = 1 if value[0, -1] == 1 or not value.any() else 0
        elif name in fill:
            filler = fill[name]
        elif value.dim() == 2:
            raise ValueError(f"inputs hold {name!r}, of which the part for an answer is unknown; leave it out.")
        else:
            continue
        extended[name] = torch.cat([value, torch.full_like(tokens, filler).to(value)], dim=1)
    extended["input_ids"] = torch.cat([ids, tokens.to(ids)], dim=1)
    return extended
