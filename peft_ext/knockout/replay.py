"""
Knocked-out passes that take over from a clean one all that the knockout cannot change: the tokens before the first
target (in a causal decoder) and, for the others, the layers before the window. Several passes run packed, as copies of
the remaining tokens in one sequence that share the clean keys and see nothing of each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from .architecture import Architecture
from .attention import zero_output
from .clean_run import CleanRun, LayerRun
from .edges import Edges
from .masks import encode


@dataclass(frozen=True)
class Knock:
    """
    One knocked-out pass.

    Attributes:
        first (`int`): the first position that it may change.
        start, end (`int`): its window of layers.
        edges ([`Edges`], *optional*): the edges to block, or
        positions (`torch.Tensor`, *optional*): bool `[batch, sequence]`, where `module` adds nothing.
        module (`str`): `"attention"` or `"mlp"`.
    """

    first: int
    start: int
    end: int
    edges: Edges | None = None
    positions: Tensor | None = None
    module: str = "attention"


def replay(
    architecture: Architecture, clean: CleanRun, knocks: Sequence[Knock], implementation: str, tokens: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """
    Run passes and give the last layer's output of each.

    Args:
        architecture ([`Architecture`]): of the model.
        clean ([`CleanRun`]): its clean pass, with states kept from the earliest `first` on.
        knocks (`Sequence[Knock]`): the passes.
        implementation (`str`): the attention that the decoder runs, `"sdpa"` or `"eager"`.
        tokens (`int`): how many tokens are packed into one sequence at most. With 1 each pass runs alone.

    Yields:
        `tuple[int, torch.Tensor]`: a pass's number and `[batch, T, D]`, its states from the clean run's start on. The
            order is the runs', not that of `knocks`.
    """
    order = sorted(range(len(knocks)), key=lambda number: (knocks[number].start, number))
    while order:
        chunk = [order.pop(0)]
        size = clean.length - knocks[chunk[0]].first
        while order and size + clean.length - knocks[order[0]].first <= tokens:
            size += clean.length - knocks[order[0]].first
            chunk.append(order.pop(0))
        states = _Packed(architecture, clean, [knocks[number] for number in chunk], implementation).run()
        yield from zip(chunk, states, strict=True)


class _Prefix(Cache):
    """A cache that shows a layer the clean keys before the copies' own, and keeps nothing."""

    def __init__(self, layer: LayerRun, tokens: int) -> None:
        super().__init__(layers=[])
        self.prefix = layer.keys[:, :, :tokens], layer.values[:, :, :tokens]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        return tuple(
            torch.cat([old, new], dim=2) for old, new in zip(self.prefix, (key_states, value_states), strict=True)
        )

    def restore(self) -> None:
        """Nothing was written."""


class _InPlace(_Prefix):
    """
    The same for a copy that runs alone: it writes its keys over the clean ones for the time of a layer, which spares a
    copy of the prefix (a third of a layer's time for one token after 642).
    """

    def __init__(self, layer: LayerRun, tokens: int) -> None:
        super().__init__(layer, tokens)
        self.whole = layer.keys, layer.values
        self.own = [part[:, :, tokens:] for part in self.whole]
        self.clean = [part.clone() for part in self.own]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        for part, new in zip(self.own, (key_states, value_states), strict=True):
            part.copy_(new)
        return self.whole

    def restore(self) -> None:
        for part, old in zip(self.own, self.clean, strict=True):
            part.copy_(old)


class _Packed:
    def __init__(
        self, architecture: Architecture, clean: CleanRun, knocks: Sequence[Knock], implementation: str
    ) -> None:
        self.architecture, self.clean, self.knocks, self.implementation = architecture, clean, knocks, implementation
        self.prefix = max(knock.first for knock in knocks)  # clean keys that some copy sees
        lengths = [clean.length - knock.first for knock in knocks]
        self.stops = torch.tensor(lengths).cumsum(0).tolist()
        self.starts = [stop - length for stop, length in zip(self.stops, lengths, strict=True)]
        self._masks: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._blocked: dict[int, Tensor] = {}
        # Layers share masks and position embeddings, so what is made of them is made once for many layers.
        self._edited: dict[int, tuple[Any, tuple[Tensor | None, Tensor | None]]] = {}
        self._gathered: dict[tuple[int, int], tuple[Any, Any]] = {}

    @torch.no_grad()
    def run(self) -> list[Tensor]:
        hidden = self.clean.layers[0].hidden[:, :0]  # [batch, packed tokens, D]
        running = 0  # copies so far; they join in the order of their windows
        for index in range(self.knocks[0].start, len(self.clean.layers)):
            layer = self.clean.layers[index]
            joining = []
            while running < len(self.knocks) and self.knocks[running].start <= index:
                joining.append(layer.hidden[:, self._kept(running) :])
                running += 1
            if joining:
                hidden = torch.cat([hidden.to(joining[0].device), *joining], dim=1)
            hidden = self._layer(index, layer, hidden, running)
        return [self._states(hidden, number) for number in range(len(self.knocks))]

    def _kept(self, number: int) -> int:
        """Where a copy begins among the kept tokens."""
        return self.knocks[number].first - self.clean.start

    def _states(self, hidden: Tensor, number: int) -> Tensor:
        own = hidden[:, self.starts[number] : self.stops[number]]
        if not self._kept(number):
            return own
        assert self.clean.final is not None
        return torch.cat([self.clean.final[:, : self._kept(number)], own], dim=1)

    def _layer(self, index: int, layer: LayerRun, hidden: Tensor, running: int) -> Tensor:
        spans = [self._kept(number) for number in range(running)]
        mask, emptied = self._mask(index, layer, running, hidden)
        arguments = {name: self._arguments(name, value, spans) for name, value in layer.arguments.items()}
        arguments["attention_mask"] = mask
        alone = len(self.knocks) == 1
        cache = _InPlace(layer, self.prefix) if alone else _Prefix(layer, self.prefix)
        arguments["past_key_values"] = cache
        module = self.architecture.layers[index].module
        try:
            with self._zeros(index, running, hidden, emptied):
                output = module(hidden, **arguments)
        finally:
            cache.restore()
        output = output[0] if isinstance(output, tuple) else output
        if layer.added is not None:
            output = output + torch.cat([layer.added[:, span:] for span in spans], dim=1)
        return output

    def _arguments(self, name: str, value: Any, spans: list[int]) -> Any:
        key = id(value), len(spans)
        if key not in self._gathered:
            kept = self.clean.length - self.clean.start
            self._gathered[key] = value, _gather(name, value, spans, kept)
        return self._gathered[key][1]

    def _mask(self, index: int, layer: LayerRun, running: int, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The mask of a layer as its attention takes it, and the rows that lost all edges."""
        state = self._active(index), running, hidden.device
        if (known := self._edited.get(id(layer.allowed))) is not None and known[0] == state:
            return known[1]
        allowed, emptied = self._edges(index, layer, running, hidden)
        mask: Tensor | None = encode(allowed, self.implementation, hidden.dtype)
        if self.implementation == "sdpa" and allowed.shape[2] == 1 and allowed.all():
            mask = None  # one token that attends to everything: kernels without a mask are faster
        self._edited[id(layer.allowed)] = state, (mask, emptied)
        return mask, emptied

    def _active(self, index: int) -> list[int]:
        return [number for number, knock in enumerate(self.knocks) if knock.start <= index < knock.end]

    def _edges(self, index: int, layer: LayerRun, running: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The packed sequence's edges, bool `[batch, 1, M, prefix + M]`, and the rows that lost all, `[batch, M]`."""
        whole, padding = self._open(layer, len(hidden))
        stop = self.stops[running - 1]
        allowed = whole[:, :, :stop, : self.prefix + stop]
        active = [number for number in self._active(index) if self.knocks[number].edges is not None]
        if not active:
            return allowed, None
        allowed, emptied = allowed.clone(), None
        for number in active:
            rows = slice(self.starts[number], self.stops[number])
            first, own = self.knocks[number].first, slice(self.prefix + rows.start, self.prefix + rows.stop)
            blocked = self._blocks(number, layer.hidden.device)  # [batch, 1, tokens, length]
            allowed[:, :, rows, :first] &= ~blocked[..., :first]
            allowed[:, :, rows, own] &= ~blocked[..., first:]
        empty = ~allowed.any(-1)[:, 0]  # [batch, M]
        if empty.any():
            at = torch.arange(stop, device=allowed.device)
            allowed[:, 0, at, self.prefix + at] |= empty
            emptied = empty & ~padding[:, :stop]
        return allowed, emptied

    def _open(self, layer: LayerRun, batch: int) -> tuple[Tensor, Tensor]:
        """Edges without knockouts, bool `[batch, 1, M, prefix + M]`, and the rows that had none, `[batch, M]`."""
        device = layer.hidden.device
        key = (id(layer.allowed), device)
        if key not in self._masks:
            total = self.stops[-1]
            whole = torch.zeros(batch, 1, total, self.prefix + total, dtype=torch.bool, device=device)
            for number, knock in enumerate(self.knocks):
                rows = slice(self.starts[number], self.stops[number])
                own = layer.allowed[:, :, self._kept(number) :].to(device)  # [batch or 1, 1, tokens, length]
                whole[:, :, rows, : knock.first] = own[..., : knock.first]
                whole[:, :, rows, self.prefix + rows.start : self.prefix + rows.stop] = own[..., knock.first :]
            padding = ~whole.any(-1)[:, 0]
            at = torch.arange(total, device=device)
            whole[:, 0, at, self.prefix + at] |= padding  # a harmless entry: kernels differ on empty rows
            self._masks[key] = whole, padding
        return self._masks[key]

    def _blocks(self, number: int, device: torch.device) -> Tensor:
        if number not in self._blocked:
            knock = self.knocks[number]
            assert knock.edges is not None
            queries, keys = range(knock.first, self.clean.length), range(self.clean.length)
            self._blocked[number] = knock.edges.blocked(queries, keys)[:, None]
        return self._blocked[number].to(device)

    @contextmanager
    def _zeros(self, index: int, running: int, hidden: Tensor, emptied: Tensor | None) -> Iterator[None]:
        """Hooks on the layer's parts that zero the rows without edges, and what module knockouts take away."""
        rows: dict[str, Tensor] = {} if emptied is None else {"attention": emptied}
        for number in self._active(index):
            knock = self.knocks[number]
            if knock.positions is not None and number < running:
                zero = rows.setdefault(
                    knock.module, torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
                )
                part = slice(self.starts[number], self.stops[number])
                zero[:, part] |= knock.positions[:, knock.first :].to(hidden.device)
        with ExitStack() as stack:
            for name, zero in rows.items():
                target = self.architecture.attention(index) if name == "attention" else self.architecture.mlp(index)
                hook = partial(_zero, zero)
                stack.enter_context(target.register_forward_hook(hook, prepend=True))
            yield


def _zero(rows: Tensor, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return zero_output(output, rows)


def _gather(name: str, value: Any, spans: list[int], kept: int) -> Any:
    """An argument of the kept tokens, for the packed ones."""
    if isinstance(value, tuple):
        return tuple(_gather(name, part, spans, kept) for part in value)
    axis = -2 if name == "position_embeddings" else -1
    if not isinstance(value, Tensor) or "position" not in name or value.dim() < -axis or value.shape[axis] != kept:
        return value
    if len(spans) == 1:
        return value.narrow(axis, spans[0], kept - spans[0])
    return torch.cat([value.narrow(axis, span, kept - span) for span in spans], dim=axis)
