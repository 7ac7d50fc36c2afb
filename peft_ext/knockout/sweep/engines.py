"""Engines that compute the passes of a sweep. All give the same numbers; they recompute more or less of a pass."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..cut.attention import AttentionKnockout
from ..cut.edges import Edges, first_position
from ..model.architecture import Architecture
from ..model.implementation import editable_attention
from ..prompts.samples import Prompt
from .clean_run import CleanRun, clean_run, logits_at
from .packed import Knock
from .replay import replay


ENGINES = ("full", "suffix", "packed")
# The output embeddings are read for many passes at once, but not for all: a vocabulary is large.
READOUTS = 32

Pair = tuple[str, str]
Span = tuple[int, int]


class Passes(NamedTuple):
    """Log-probabilities of each row's answer, float32 `[batch]`."""

    answer: Tensor  # int64 `[batch]`: the given answer, or the clean pass's most probable token
    clean: Tensor  # without a knockout
    knocked: dict[tuple[Pair, Span], Tensor]  # by pair and span of layers


@torch.no_grad()
def run_engine(
    engine: str, architecture: Architecture, model: nn.Module, prompt: Prompt, spans: Mapping[Pair, Sequence[Span]]
) -> Passes:
    """
    One prompt's clean pass and its knocked-out passes.

    Args:
        engine (`str`): `"full"`: the whole model for each pass. `"suffix"`: states before the first target and before
            the window's first layer come from the clean pass. `"packed"`: so too, and many passes in one.
        spans (`dict[tuple[str, str], list[tuple[int, int]]]`): first layer and the one after the last, of each
            window of each pair.

    Raises:
        [`NotReusable`]: by the fast engines, if they would not be exact for this model and these targets.
    """
    order = [(pair, span) for pair, wanted in spans.items() for span in wanted]
    if engine == "full":
        logits = logits_at(architecture, model, prompt.inputs, prompt.readout, use_cache=False)
        answer = _answer(prompt, logits)
        knocked = {
            (pair, span): _read(_full(architecture, model, prompt, prompt.edges[pair], span), answer)
            for pair, span in order
        }
        return Passes(answer, _read(logits, answer), knocked)
    with editable_attention(architecture) as implementation:
        targets = {pair: first_position(prompt.edges[pair].target) for pair in spans}
        run = clean_run(architecture, model, prompt.inputs, prompt.readout, targets.values())
        answer = _answer(prompt, run.logits)
        _warn_of_nothing([pair for pair in spans if not _blocks(prompt.edges[pair], run)])
        knocks = [Knock(run.firsts[targets[pair]], *span, edges=prompt.edges[pair]) for pair, span in order]
        rows, read = torch.arange(len(answer)), prompt.readout - run.start
        passes = replay(architecture, run, knocks, implementation, packed=engine == "packed")
        last = {number: states[rows, read] for number, states in passes}  # [batch, D]
    states = torch.stack([last[number] for number in range(len(order))])  # [passes, batch, D]
    found = [_read(logits, answer) for some in states.split(READOUTS) for logits in architecture.logits(some)]
    return Passes(answer, _read(run.logits, answer), dict(zip(order, found, strict=True)))


def _answer(prompt: Prompt, logits: Tensor) -> Tensor:
    return logits.argmax(-1) if prompt.answer is None else prompt.answer.to(logits.device)


def _read(logits: Tensor, answer: Tensor) -> Tensor:
    """`[batch, vocabulary]` to the log-probability of the answer, `[batch]`."""
    answer = answer.to(logits.device)
    return logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]


def _full(architecture: Architecture, model: nn.Module, prompt: Prompt, edges: Edges, span: Span) -> Tensor:
    with AttentionKnockout(model, range(*span), [(edges.source, edges.target)], answer_tokens=prompt.answer_tokens):
        return logits_at(architecture, model, prompt.inputs, prompt.readout, use_cache=False)


def _blocks(edges: Edges, run: CleanRun) -> bool:
    """Whether any layer has any of a pair's edges."""
    distinct = {id(layer.allowed): layer.allowed for layer in run.layers}.values()
    for allowed in distinct:
        blocked = edges.blocked(range(run.start, run.length), range(run.length), allowed.device)
        if (blocked & allowed[:, 0]).any():
            return True
    return False


def _warn_of_nothing(pairs: Sequence[Pair]) -> None:
    """As [`AttentionKnockout`] does, of pairs that no layer has an edge of."""
    if not pairs:
        return
    names = ", ".join(":".join(pair) for pair in pairs[:3]) + (f" and {len(pairs) - 3} more" if len(pairs) > 3 else "")
    source, target = pairs[0]
    warnings.warn(
        f"{names} {'block' if len(pairs) > 1 else 'blocks'} nothing: in no layer does {target} attend to {source}, "
        "since it comes earlier or lies outside the layers' windows.",
        stacklevel=2,
    )
