"""
The masks that attention receives, read and rewritten. transformers passes `None` (causal, by sdpa's own flag), a bool
mask (True attends; sdpa) or a float mask (0 or the dtype's minimum, added to the scores; eager).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache


class Span(NamedTuple):
    """Where one call to a layer stands in the whole sequence, the cache included."""

    queries: range  # positions of the tokens in this call
    keys: range  # positions of the keys that it sees. A sliding cache has dropped the first ones


def span_of_call(arguments: dict[str, Any], layer: int) -> Span:
    """
    The positions of a call, before the layer has added its keys to the cache. `arguments` are the call's by name;
    `layer` is the layer's number in the cache.
    """
    tokens = arguments["hidden_states"].shape[1]
    cache, mask = arguments.get(cache_name(arguments)), arguments.get("attention_mask")
    if cache is None:
        keys = mask.shape[-1] if isinstance(mask, Tensor) else tokens
        return Span(range(keys - tokens, keys), range(keys))
    start = int(cache.get_query_offset(layer) if hasattr(cache, "get_query_offset") else cache.get_seq_length(layer))
    length, offset = (int(number) for number in cache.get_mask_sizes(tokens, layer))
    if isinstance(mask, Tensor) and mask.dim() == 4:
        length = mask.shape[-1]
    return Span(range(start, start + tokens), range(offset, offset + length))


def cache_name(arguments: dict[str, Any]) -> str:
    """The argument that holds the cache: `past_key_values`, or `layer_past` in older families."""
    return next((name for name, value in arguments.items() if isinstance(value, Cache)), "past_key_values")


def allowed_edges(mask: Tensor | None, span: Span, attention: nn.Module, device: torch.device) -> Tensor:
    """
    Which edges the model itself has: bool `[batch or 1, heads or 1, queries, keys]`, True where a query attends.

    Raises:
        `ValueError`: if the mask is of a kind that has no edges to read.
    """
    if mask is None:
        shape = (1, 1, len(span.queries), len(span.keys))
        if not getattr(attention, "is_causal", True):
            return torch.ones(shape, dtype=torch.bool, device=device)
        rows = torch.arange(span.queries.start, span.queries.stop, device=device)
        columns = torch.arange(span.keys.start, span.keys.stop, device=device)
        return (columns <= rows.unsqueeze(1)).view(shape)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        kind = f"a {mask.dim()}-dimensional tensor" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"attention_mask reached {type(attention).__name__} as {kind}, whose edges cannot be edited; load the "
            'model with attn_implementation="sdpa" or "eager".'
        )
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def encode(allowed: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """Edges in the form that an implementation takes: bool for sdpa, numbers to add for eager."""
    if implementation == "sdpa":
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
        ~allowed, torch.finfo(dtype).min
    )


def open_one(allowed: Tensor, rows: Tensor, span: Span) -> Tensor:
    """
    Give `rows` without any edge, bool `[batch, heads, queries]`, the edge to their own token, in place. Kernels differ
    on empty rows (zeros, NaN, or the mean over all keys, future ones included), so these rows get a harmless entry
    here and their output is overwritten later.
    """
    own = torch.arange(len(span.queries), device=allowed.device) + (span.queries.start - span.keys.start)
    diagonal = torch.zeros(allowed.shape[-2:], dtype=torch.bool, device=allowed.device)
    diagonal[torch.arange(len(span.queries), device=allowed.device), own.clamp(0, allowed.shape[-1] - 1)] = True
    return allowed.logical_or_(rows.unsqueeze(-1) & diagonal)


def repeat_rows(mask: Tensor, batch: int, name: str) -> Tensor:
    """A mask's rows for a batch that beams have multiplied; one row serves any batch."""
    if len(mask) in (1, batch):
        return mask
    if batch % len(mask):
        raise ValueError(
            f"{name} has {len(mask)} rows, but the model was called with a batch of {batch}: give one row per sample."
        )
    return mask.repeat_interleave(batch // len(mask), 0)
