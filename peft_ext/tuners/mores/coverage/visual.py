"""Visual tokens of the whole prompt: from input_ids or masks, and for tokens in a cache from its trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import MASK_ARGUMENT, Call
from .padding import repeat_rows
from .prompt import Prompt


@dataclass
class Given:
    """A mask of visual tokens that was given around calls, with a number of its own."""

    mask: Tensor
    number: int


@dataclass
class Known:
    """What is known besides a call's own arguments."""

    visual_token_ids: tuple[int, ...]  # placeholders of visual tokens in `input_ids`; empty for a text model
    given: Given | None = None  # the prompt's visual tokens
    prompt: Prompt | None = None  # that of generate(), while it runs
    unfinished: bool = False  # whether more of the prompt follows the call
    apart: bool = False  # whether the call is for another text than generate()'s prompt

    def of(self, call: Call) -> Known:
        """What of it is about a call."""
        if self.prompt is None or self.prompt.holds(call):
            return self
        return Known(self.visual_token_ids, apart=True)

    def total(self, call: Call) -> int:
        """The number of tokens to choose among: the prompt's in generate(), else all up to the call's end."""
        return call.end if self.prompt is None else self.prompt.length


def visual_tokens_of(call: Call, known: Known) -> tuple[Tensor, int]:
    """
    Find the visual tokens, those in the cache included.

    Returns:
        `(torch.Tensor, int)`: bool `[rows, known.total(call) or more]`, as far as a given mask goes; and from where on
            they are known.

    Raises:
        `RuntimeError`: if there are neither input_ids nor a mask.
        `ValueError`: if a mask does not fit the tokens.
    """
    if call.visual is None:
        call.visual = _find(call, known)
    return call.visual


def _find(call: Call, known: Known) -> tuple[Tensor, int]:
    given, prompt, trace = known.given, known.prompt, call.trace
    total = known.total(call)
    past, known_from = trace.visual_before(call.start, call.rows, call.device)
    name = MASK_ARGUMENT
    if call.visual_token_mask is not None:
        part = call.visual_token_mask
        check_mask(part, (call.rows, call.tokens), widths=(call.tokens, call.end))
        at = call.end - part.shape[1]
    elif given is not None:
        part, at = given.mask, 0
        noted = trace.visual if call.start and given.number == trace.given else None
        if noted is not None and (prompt is None or noted.shape[1] == total):
            part, name = noted, "past_key_values"  # when the prompt's first part was passed
        else:
            at = _place(given.mask, call, known)
    elif not known.visual_token_ids:
        return F.pad(past, (0, total - call.start)), 0
    else:
        ids, at = call.input_ids, call.start
        if prompt is not None and prompt.input_ids is not None:
            ids, at = prompt.input_ids, prompt.length - prompt.input_ids.shape[1]
        if ids is None:
            raise RuntimeError(
                "MoReS cannot tell which tokens are visual, since the model was called without input_ids. Pass them, "
                "or pass visual_token_mask (bool, [batch, tokens]) to the forward call or to generate()."
            )
        part, name = torch.isin(ids, torch.tensor(known.visual_token_ids, device=ids.device)), "input_ids"
    part = repeat_rows(part.to(call.device), call.rows, name)
    end = at + part.shape[1]
    whole = F.pad(past, (0, max(total, end) - call.start))
    whole[:, at:end] = part
    return whole, known_from if at else 0


def _place(mask: Tensor, call: Call, known: Known) -> int:
    """
    Where in the sequence a given mask begins: at its start, or after the cache.

    Raises:
        `ValueError`: if it is for another number of tokens.
    """
    total, width, whole = known.total(call), mask.shape[1], known.prompt is not None
    if width == total or (not whole and not call.start and width < total):
        return 0
    if width == total - call.start:
        return call.start
    if not whole and width > total and call.cache is not None:
        return 0  # of a prompt whose first part this is
    cached = f", or ({call.rows}, {total}) with the {call.start} in the cache" if call.start else ""
    raise ValueError(
        f"visual_token_mask must be a bool tensor of shape ({call.rows}, {total - call.start}), one value per token"
        f"{cached}, but it has the shape {tuple(mask.shape)}."
    )


def check_mask(mask: Any, shape: Sequence[int | str], widths: Sequence[int] | None = None) -> None:
    """
    Raises `ValueError` if a mask of visual tokens is not a bool matrix of one of the `widths`; `shape` is the shape
    that the message names.
    """
    kind = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
    good = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.dim() == 2 and len(mask) > 0
    if not good or (widths is not None and mask.shape[1] not in widths):
        raise ValueError(
            f"visual_token_mask must be a bool tensor of shape ({', '.join(map(str, shape))}), one value per token, "
            f"but it is {kind}."
        )
