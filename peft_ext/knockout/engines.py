"""How a sweep computes its knocked-out passes. All give the same numbers; they differ in what they compute anew."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .architecture import Architecture
from .attention import AttentionKnockout
from .clean_run import CleanRun, clean_run, logits_at
from .edges import Edges
from .implementation import editable_attention
from .replay import Knock, replay
from .samples import Prompt
from .windows import Window


ENGINES = ("full", "suffix", "packed")
# Packed copies attend to each other in vain: beyond some hundreds of tokens this costs more than starting anew saves.
PACKED_TOKENS = 256

Pair = tuple[str, str]
Span = tuple[int, int]


@torch.no_grad()
def run_engine(
    engine: str, architecture: Architecture, model: nn.Module, prompt: Prompt, spans: Mapping[Pair, Sequence[Span]]
) -> tuple[Tensor, dict[tuple[Pair, Span], Tensor]]:
    """
    One prompt's clean pass and its knocked-out passes.

    Args:
        engine (`str`): `"full"`: the whole model for each pass. `"suffix"`: states before the first target and before
            the window's first layer come from the clean pass. `"packed"`: so too, and many passes in one.
        spans (`dict[tuple[str, str], list[tuple[int, int]]]`): first layer and the one after the last, of each
            window of each pair.

    Returns:
        `tuple`: the clean log-probabilities, float32 `[batch, vocabulary]` at the readout position, and the
            knocked-out ones by pair and span.

    Raises:
        [`NotReusable`]: by the fast engines, if they would not be exact for this model and these targets.
    """
    if engine == "full":
        clean = logits_at(architecture, model, prompt.inputs, prompt.readout, use_cache=False).log_softmax(-1)
        return clean, {
            (pair, span): _full(architecture, model, prompt, prompt.edges[pair], span)
            for pair, wanted in spans.items()
            for span in wanted
        }
    with editable_attention(architecture) as implementation:
        targets = [_first_target(prompt.edges[pair]) for pair in spans]
        run = clean_run(architecture, model, prompt.inputs, prompt.readout, targets)
        firsts = dict(zip(spans, run.firsts, strict=True))
        for pair in spans:
            _warn_of_nothing(pair, prompt.edges[pair], run)
        order = [(pair, span) for pair, wanted in spans.items() for span in wanted]
        knocks = [Knock(firsts[pair], *span, edges=prompt.edges[pair]) for pair, span in order]
        tokens = PACKED_TOKENS if engine == "packed" else 1
        read = prompt.readout - run.start
        found = {}
        rows = torch.arange(len(read))
        for number, states in replay(architecture, run, knocks, implementation, tokens):
            found[order[number]] = architecture.logits(states[rows, read]).log_softmax(-1)
    return run.logits.log_softmax(-1), found


def _full(architecture: Architecture, model: nn.Module, prompt: Prompt, edges: Edges, span: Span) -> Tensor:
    knockout = AttentionKnockout(
        model, range(*span), [(edges.source, edges.target)], answer_tokens=prompt.answer_tokens
    )
    with knockout:
        return logits_at(architecture, model, prompt.inputs, prompt.readout, use_cache=False).log_softmax(-1)


def _first_target(edges: Edges) -> int:
    """The first position that a pair's knockout changes, in any row."""
    return int(edges.target.int().argmax(1).min())


def _warn_of_nothing(pair: Pair, edges: Edges, run: CleanRun) -> None:
    """As [`AttentionKnockout`] does, where no layer has any of a pair's edges."""
    distinct = {id(layer.allowed): layer.allowed for layer in run.layers}.values()
    for allowed in distinct:
        blocked = edges.blocked(range(run.start, run.length), range(run.length), allowed.device)
        if (blocked & allowed[:, 0]).any():
            return
    warnings.warn(
        f"{pair[0]}:{pair[1]} blocks nothing: in no layer does {pair[1]} attend to {pair[0]}, since it comes earlier "
        "or lies outside the layers' windows.",
        stacklevel=2,
    )


def span_of(window: Window) -> Span:
    """The layers of a window."""
    return window.start, window.end
