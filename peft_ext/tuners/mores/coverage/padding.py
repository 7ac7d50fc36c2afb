"""Real tokens of a row, read from the masks that a model takes, and the beginnings of packed texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


_REMEDY = "Pass a 2-D attention_mask, 1 for each real token, of this call and of the cache before it."


def real_tokens(mask: Any, rows: int, start: int, tokens: int, device: torch.device) -> Tensor:
    """
    Tell padding from an attention mask.

    Args:
        mask (*optional*): `None` for no padding; a tensor `[batch, start + tokens]`; a causal mask `[batch, heads,
            tokens, start + tokens]`, bool or added to the scores; or a dictionary of these by kind of layer. Keys
            after the call's last token, which a static cache has, are left out.
        rows (`int`): the call's batch size.
        start (`int`): tokens in the cache before the call.
        tokens (`int`): tokens in the call.
        device (`torch.device`): of the result.

    Returns:
        `torch.Tensor`: bool `[rows, start + tokens]`.

    Raises:
        `ValueError`: if padding cannot be told from the mask.
    """
    end = start + tokens
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return torch.ones(rows, end, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        kind = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(f"attention_mask is {kind}, from which MoReS cannot tell padding. {_REMEDY}")
    if mask.shape[-1] < end or (mask.dim() == 4 and mask.shape[2] != tokens):
        raise ValueError(
            f"attention_mask has the shape {tuple(mask.shape)}, but the call has {tokens} tokens after {start} in the "
            f"cache. {_REMEDY}"
        )
    mask = mask.to(device)
    real = mask[:, :end].bool() if mask.dim() == 2 else _from_causal(mask, start)
    return repeat_rows(real, rows, "attention_mask")


def _from_causal(mask: Tensor, start: int) -> Tensor:
    """Tokens that the last real token attends to, if the tokens before it attend to the same."""
    tokens = mask.shape[2]
    end = start + tokens
    allowed = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()
    own = allowed[:, 0, :, start:end].diagonal(dim1=1, dim2=2)  # [batch, tokens]: padding is a key of no query
    slots = torch.arange(end, device=mask.device)
    last = torch.where(own, slots[start:], -1).amax(1)  # [batch]
    batch = torch.arange(len(mask), device=mask.device)
    real = allowed[batch, 0, (last - start).clamp(min=0), :end] & (slots <= last.unsqueeze(1))
    earlier = slots <= slots[start:].unsqueeze(1)  # [tokens, end]
    differs = (allowed[..., :end] != real[:, None, None]) & earlier & own[:, None, :, None]
    if bool(differs.any()) or bool((last < 0).any()):
        raise ValueError(
            "attention_mask is 4-D and more than causal with padding (a sliding window? several texts in a row?), so "
            f"MoReS cannot tell padding from it. {_REMEDY}"
        )
    return real


def packed_starts(position_ids: Any, real: Tensor) -> Tensor:
    """
    Where a text begins in the middle of a row, bool `[batch, tokens]`: positions that do not go on from the token
    before. `position_ids`: `[batch, tokens]`, or `[3 or 4, batch, tokens]` as Qwen-VL's.
    """
    starts = torch.zeros_like(real)
    if isinstance(position_ids, Tensor) and position_ids.dim() in (2, 3) and position_ids.shape[-1] == real.shape[1]:
        steps = (position_ids if position_ids.dim() == 2 else position_ids[0]).to(real.device).diff(dim=-1)
        # In time, an image's tokens stand still.
        back = steps <= 0 if position_ids.dim() == 2 else steps < 0
        starts[:, 1:] = back & real[:, 1:] & real[:, :-1]
    return starts


def repeat_rows(mask: Tensor, rows: int, name: str) -> Tensor:
    """As generate() repeats samples for beams."""
    if rows % max(len(mask), 1):
        raise ValueError(f"{name} has {len(mask)} rows, but the batch has {rows}; give one row per sample.")
    return mask if len(mask) == rows else mask.repeat_interleave(rows // len(mask), 0)
