"""Check the inputs of an adapted attention. It refuses masks of wrong types and shapes, as torch's own module does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_attention_inputs(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Any, attn_mask: Any
) -> None:
    """
    Check the arguments of an attention's forward. Raises `ValueError` for everything that torch's module refuses too.
    """
    dims = query.dim()
    if dims not in (2, 3) or key.dim() != dims or value.dim() != dims:
        raise ValueError(
            f"query, key and value have {dims}, {key.dim()} and {value.dim()} dimensions; all must have 3, or all 2 "
            "for a sample without a batch."
        )
    widths = {"query": attention.embed_dim, "key": attention.kdim, "value": attention.vdim}
    for (name, width), x in zip(widths.items(), (query, key, value), strict=True):
        if x.shape[-1] != width:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; its last dimension must be {width}.")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"key has shape {tuple(key.shape)} and value {tuple(value.shape)}; their tokens must agree.")
    batch_dim = None if dims == 2 else 0 if attention.batch_first else 1
    if batch_dim is not None and query.shape[batch_dim] != key.shape[batch_dim]:
        raise ValueError(f"query has shape {tuple(query.shape)} and key {tuple(key.shape)}; their batches must agree.")
    token_dim = 0 if dims == 2 or not attention.batch_first else 1
    queries, keys = query.shape[token_dim], key.shape[token_dim]
    batch = 1 if batch_dim is None else query.shape[batch_dim]
    _check_mask("key_padding_mask", key_padding_mask, [(keys,) if dims == 2 else (batch, keys)])
    _check_mask("attn_mask", attn_mask, [(queries, keys), (batch * attention.num_heads, queries, keys)])


def _check_mask(name: str, mask: Any, shapes: list[tuple[int, ...]]) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{name} is of type {found}; it must be a bool tensor, true where attention is forbidden, or a float one "
            "that is added to the scores. Of a mask with 1 for tokens to look at, as tokenizers make it, pass "
            f"`{name} == 0`."
        )
    if mask.shape not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; it must have {wanted}.")
