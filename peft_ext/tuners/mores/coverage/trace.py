"""Trace of a cache: its visual and its steered tokens. It is kept on the cache and copied with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from .padding import repeat_rows


_ATTRIBUTE = "_mores_trace"


@dataclass
class Steered:
    """The tokens that adapters with the same options have steered."""

    chosen: Tensor  # bool `[rows, tokens]` from the cache's first token on; later ones are not steered
    prompt_end: int | None = None  # where the prompt ended whose last tokens were chosen; `None` while it may go on


@dataclass
class Trace:
    """What is known of the tokens in a cache."""

    length: int = 0  # tokens that calls of the adapted model have put into the cache
    visual: Tensor | None = None  # bool `[rows, tokens]` from the first token on; later ones are not visual
    known_from: int = 0  # of the tokens before, it is not known whether they are visual
    given: int | None = None  # number of the given mask that `visual` was taken from
    prompt_length: int | None = None  # of generate(), if that filled the cache
    apart: bool = False  # whether generate() filled the cache with another text than its prompt
    steered: dict[Any, Steered] = field(default_factory=dict)  # by adapter options

    def visual_before(self, end: int, rows: int, device: torch.device) -> tuple[Tensor, int]:
        """`(visual [rows, end], known_from)`."""
        return _at(self.visual, end, rows, device), self.known_from if self.length >= end else end

    def steered_before(self, key: Any, end: int, rows: int, device: torch.device) -> Tensor:
        """Bool `[rows, end]`."""
        return _at(self.steered[key].chosen if key in self.steered else None, end, rows, device)


def _at(mask: Tensor | None, end: int, rows: int, device: torch.device) -> Tensor:
    whole = torch.zeros(rows, end, dtype=torch.bool, device=device)
    if mask is not None:
        part = repeat_rows(mask[:, :end].to(device), rows, "past_key_values")
        whole[:, : part.shape[1]] = part
    return whole


def trace_of(cache: Any) -> Trace | None:
    """The trace that a cache carries."""
    return getattr(cache, _ATTRIBUTE, None)


def leave_trace(cache: Cache, trace: Trace) -> None:
    """Put a trace on a cache. A later copy of the cache has a copy of it."""
    setattr(cache, _ATTRIBUTE, trace)


def cached_tokens(cache: Any) -> int | None:
    """Number of tokens in a cache; `None` if it cannot be told."""
    if cache is None:
        return 0
    trace = trace_of(cache)
    try:
        return int(cache.get_seq_length())
    except ValueError:  # linear attention alone, which keeps no tokens
        if trace is not None:
            return trace.length
        return None if cache.has_previous_state() else 0
    except AttributeError:  # not a cache of one sequence per row
        return None


def cache_of(output: Any) -> Cache | None:
    """The cache in a model's output."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
    return next((value for value in values if isinstance(value, Cache)), None)
