"""
Passes from a clean one on, as copies of the tokens from the first target on in one sequence: they share the clean keys
before these tokens, and see nothing of each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cut.attention import zero_output
from ..cut.edges import Edges
from ..model.architecture import Architecture
from ..model.masks import encode
from ..model.threads import own_thread
from .clean_run import CleanRun, LayerRun
from .prefix_cache import InPlace, Prefix


@dataclass(frozen=True)
class Knock:
    """One knocked-out pass."""

    first: int  # the first position that it may change
    start: int  # the first layer of its window
    end: int  # the layer after its last
    edges: Edges | None = None  # the edges to block, or
    positions: Tensor | None = None  # bool `[batch, sequence]`, where `module` adds nothing
    module: str = "attention"  # `"attention"` or `"mlp"`


class PackedPasses:
    """Passes packed into one sequence, or one of them alone."""

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
        self._edited: dict[int, dict[Any, tuple[Tensor | None, Tensor | None]]] = {}
        self._gathered: dict[tuple[int, int], tuple[Any, Any]] = {}

    def run(self) -> list[Tensor]:
        hidden = self.clean.layers[0].hidden[:, :0]  # [batch, packed tokens, D]
        running = 0  # copies so far; they join in the order of their windows
        for index in range(self.knocks[0].start, len(self.clean.layers)):
            layer = self.clean.layers[index]
            joining = []
            while running < len(self.knocks) and self.knocks[running].start <= index:
                joining.append(layer.hidden[:, self.kept(running) :])
                running += 1
            if joining:
                hidden = torch.cat([hidden.to(joining[0].device), *joining], dim=1)
            active = tuple(number for number in range(running) if index < self.knocks[number].end)
            hidden = self.layer(index, layer, hidden, running, active)
        return [
            self.whole(hidden[:, self.starts[number] : self.stops[number]], number)
            for number in range(len(self.knocks))
        ]

    def kept(self, number: int) -> int:
        """Index of a copy's first token among the kept tokens."""
        return self.knocks[number].first - self.clean.start

    def whole(self, own: Tensor, number: int) -> Tensor:
        """A copy's states with the clean ones before them, from the clean run's start on."""
        if not self.kept(number):
            return own
        assert self.clean.final is not None
        return torch.cat([self.clean.final[:, : self.kept(number)].to(own.device), own], dim=1)

    def layer(self, index: int, layer: LayerRun, hidden: Tensor, running: int, active: tuple[int, ...]) -> Tensor:
        """
        One layer's output for `hidden` `[batch, M, D]`, the tokens of the `running` copies so far; the `active` ones
        have this layer in their window.
        """
        spans = [self.kept(number) for number in range(running)]
        mask, emptied = self._mask(layer, running, active, hidden)
        arguments = {name: self._arguments(name, value, spans) for name, value in layer.arguments.items()}
        arguments["attention_mask"] = mask
        cache = InPlace(layer, self.prefix) if len(self.knocks) == 1 else Prefix(layer, self.prefix)
        arguments[layer.cache_name] = cache
        module = self.architecture.layers[index].module
        try:
            with self._zeros(index, active, hidden, emptied):
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

    def _mask(
        self, layer: LayerRun, running: int, active: tuple[int, ...], hidden: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The mask of a layer as its attention takes it, and the rows that lost all edges."""
        state = active, running, hidden.device
        known = self._edited.setdefault(id(layer.allowed), {})
        if state not in known:
            if len(known) == 2:  # with and without the knockout, for a pass that runs alone
                known.clear()
            allowed, emptied = self._edges(layer, running, active, hidden)
            mask: Tensor | None = encode(allowed, self.implementation, hidden.dtype)
            if self.implementation == "sdpa" and allowed.shape[2] == 1 and allowed.all():
                mask = None  # one token that attends to everything: kernels without a mask are faster
            known[state] = mask, emptied
        return known[state]

    def _edges(
        self, layer: LayerRun, running: int, active: tuple[int, ...], hidden: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The packed sequence's edges, bool `[batch, 1, M, prefix + M]`, and the rows that lost all, `[batch, M]`."""
        whole, padding = self._open(layer, len(hidden))
        stop = self.stops[running - 1]
        allowed = whole[:, :, :stop, : self.prefix + stop]
        blocking = [number for number in active if self.knocks[number].edges is not None]
        if not blocking:
            return allowed, None
        allowed, emptied = allowed.clone(), None
        for number in blocking:
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
                own = layer.allowed[:, :, self.kept(number) :].to(device)  # [batch or 1, 1, tokens, length]
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
    def _zeros(self, index: int, active: tuple[int, ...], hidden: Tensor, emptied: Tensor | None) -> Iterator[None]:
        """Hooks on the layer's parts that zero the rows without edges, and what module knockouts take away."""
        rows: dict[str, Tensor] = {} if emptied is None else {"attention": emptied}
        for number in active:
            knock = self.knocks[number]
            if knock.positions is not None:
                zero = rows.setdefault(
                    knock.module, torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
                )
                part = slice(self.starts[number], self.stops[number])
                zero[:, part] |= knock.positions[:, knock.first :].to(hidden.device)
        with ExitStack() as stack:
            for name, zero in rows.items():
                target = self.architecture.attention(index) if name == "attention" else self.architecture.mlp(index)
                hook = own_thread(lambda module, args, output, zero=zero: zero_output(output, zero))
                stack.enter_context(target.register_forward_hook(hook, prepend=True))
            yield


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
