"""
Knocked-out passes that take over from a clean one all that the knockout cannot change: the tokens before the first
target (in a causal decoder) and, for the others, the layers before the window. Each runs in a sequence of its own, or
many run packed into one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.architecture import Architecture
from .clean_run import CleanRun
from .packed import Knock, PackedPasses


# Packed copies attend to each other in vain: beyond some hundreds of tokens this costs more than starting anew saves.
PACKED_TOKENS = 256
# Passes that run one by one only keep their states meanwhile: a few MiB for a model 5,120 wide.
APART_TOKENS = 512


def replay(
    architecture: Architecture, clean: CleanRun, knocks: Sequence[Knock], implementation: str, packed: bool
) -> Iterator[tuple[int, Tensor]]:
    """
    Run passes and give the number of each with its states after the last layer, `[batch, T, D]` from the clean run's
    start on. The order is the runs', not that of `knocks`.

    With `packed` several passes are one sequence. If not, a layer is called for each pass by itself. Either way some
    hundred tokens run at a time; a pass with more runs alone.
    """
    tokens = PACKED_TOKENS if packed else APART_TOKENS
    order = sorted(range(len(knocks)), key=lambda number: (knocks[number].start, number))
    while order:
        chunk = [order.pop(0)]
        size = clean.length - knocks[chunk[0]].first
        while order and size + clean.length - knocks[order[0]].first <= tokens:
            size += clean.length - knocks[order[0]].first
            chunk.append(order.pop(0))
        together = [knocks[number] for number in chunk]
        with torch.no_grad():
            if packed:
                states = PackedPasses(architecture, clean, together, implementation).run()
            else:
                states = _apart(architecture, clean, together, implementation)
        yield from zip(chunk, states, strict=True)


def _apart(architecture: Architecture, clean: CleanRun, knocks: Sequence[Knock], implementation: str) -> list[Tensor]:
    """
    Passes in sequences of their own, but layer by layer: each layer's weights are fetched once for all of them (for a
    token of a 256-wide Llama a layer's products take 0.15 ms then, 0.45 ms when the passes run one after the other).
    What passes have in common, as windows do that are clipped to one first layer, runs once.
    """
    alike: dict[Any, PackedPasses] = {}
    for knock in knocks:
        if _intervention(knock) not in alike:
            alike[_intervention(knock)] = PackedPasses(architecture, clean, [knock], implementation)
    states: dict[int, Tensor] = {}
    for index in range(knocks[0].start, len(clean.layers)):
        layer = clean.layers[index]
        done: dict[Any, tuple[Tensor, Tensor]] = {}  # by what goes in and what is knocked out; the input stays alive
        for number, knock in enumerate(knocks):
            if index < knock.start:
                break
            own, active = alike[_intervention(knock)], index < knock.end
            hidden = states.get(number)
            key = knock.first if hidden is None else id(hidden), _intervention(knock) if active else None
            if key not in done:
                begin = layer.hidden[:, own.kept(0) :] if hidden is None else hidden
                done[key] = begin, own.layer(index, layer, begin, 1, (0,) if active else ())
            states[number] = done[key][1]
    return [alike[_intervention(knock)].whole(states[number], 0) for number, knock in enumerate(knocks)]


def _intervention(knock: Knock) -> tuple[int, int, int, str]:
    """The knockout of a pass, independent of its window."""
    return knock.first, id(knock.edges), id(knock.positions), knock.module
