"""Engines that compute the passes of a sweep. All give the same numbers; they recompute more or less of a pass."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..cut.attention import AttentionKnockout
from ..cut.edges import Edges
from ..model.architecture import Architecture
from ..model.implementation import editable_attention
from ..prompts.samples import Prompt
from .clean_run import CleanRun, clean_run, logits_at
from .replay import Knock, replay
from .windows import Window


ENGINES = ("full", "suffix", "packed")
# Packed copies attend to each other in vain: beyond some hundreds of tokens this costs more than starting anew saves.
PACKED_TOKENS = 256
# Passes that run one by one only keep their states meanwhile: a few MiB for a model 5,120 wide.
APART_TOKENS = 512
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
        targets = {pair: _first_target(prompt.edges[pair]) for pair in spans}
        distinct = list(dict.fromkeys(targets.values()))
        run = clean_run(architecture, model, prompt.inputs, prompt.readout, distinct)
        answer = _answer(prompt, run.logits)
        firsts = dict(zip(distinct, run.firsts, strict=True))
        _warn_of_nothing([pair for pair in spans if not _blocks(prompt.edges[pair], run)])
        knocks = [Knock(firsts[targets[pair]], *span, edges=prompt.edges[pair]) for pair, span in order]
        rows, read = torch.arange(len(answer)), prompt.readout - run.start
        packed = engine == "packed"
        passes = replay(architecture, run, knocks, implementation, PACKED_TOKENS if packed else APART_TOKENS, packed)
        numbers, last = [], []
        for number, states in passes:
            numbers.append(number)
            last.append(states[rows, read])  # [batch, D]
        found = {}
        for some in range(0, len(last), READOUTS):
            logits = architecture.logits(torch.stack(last[some : some + READOUTS]))  # [passes, batch, vocabulary]
            for number, own in zip(numbers[some : some + READOUTS], logits, strict=True):
                found[order[number]] = _read(own, answer)
    return Passes(answer, _read(run.logits, answer), found)


def _answer(prompt: Prompt, logits: Tensor) -> Tensor:
    return logits.argmax(-1) if prompt.answer is None else prompt.answer.to(logits.device)


def _read(logits: Tensor, answer: Tensor) -> Tensor:
    """`[batch, vocabulary]` to the log-probability of the answer, `[batch]`."""
    answer = answer.to(logits.device)
    return logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]


def _full(architecture: Architecture, model: nn.Module, prompt: Prompt, edges: Edges, span: Span) -> Tensor:
    knockout = AttentionKnockout(
        model, range(*span), [(edges.source, edges.target)], answer_tokens=prompt.answer_tokens
    )
    with knockout:
        return logits_at(architecture, model, prompt.inputs, prompt.readout, use_cache=False)


def _first_target(edges: Edges) -> int:
    """The first position that a pair's knockout changes, in any row."""
    return int(edges.target.int().argmax(1).min())


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


def span_of(window: Window) -> Span:
    """The layers of a window."""
    return window.start, window.end
