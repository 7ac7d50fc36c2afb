"""The prompt of generate(), which passes it to the model in parts, repeated, or with tokens after it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .call import Call
from .padding import repeat_rows
from .trace import trace_of


@dataclass
class Prompt:
    """The prompt of generate()."""

    length: int  # its tokens, those in the cache included
    input_ids: Tensor | None = None  # `[batch, n]`, its last n tokens
    attention_mask: Tensor | None = None  # `[batch, length]`; `None` if it was not passed
    embedded: bool = False  # whether it was passed as embeddings
    assists: bool = False  # whether it stands for the candidates of assisted generation
    # The steered tokens, as far as they have been found
    chosen: dict[Any, tuple[Tensor, int]] = field(default_factory=dict)

    def holds(self, call: Call) -> bool:
        """Whether a call is for this prompt. Others are for texts of their own, as guidance_scale's."""
        if call.trace.apart:
            return False
        if call.input_ids is None or call.start >= self.length:
            return True
        if self.input_ids is None:
            return not self.embedded
        first = self.length - self.input_ids.shape[1]  # the place of its first known token
        start, end = max(call.start, first), min(call.end, self.length)
        own = repeat_rows(self.input_ids, call.rows, "input_ids")[:, start - first : end - first].to(call.device)
        return torch.equal(own, call.input_ids[:, start - call.start : end - call.start])


def read_prompt(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prompt:
    """Read the arguments of generate()."""
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or not ids.shape[1]:
        ids = None
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    assists = bool(getattr(config, "is_assistant", False))
    mask, embeddings = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        mask = None
    if embeddings is not None:  # of the whole prompt, also where a part of it is cached
        length = embeddings.shape[1]
        ids = ids if ids is not None and ids.shape[1] == length else None
    elif ids is not None:
        # Of the tokens after the cache alone, if the mask has more.
        length = ids.shape[1] if mask is None else max(ids.shape[1], mask.shape[1])
    else:
        length = 1  # the token that begins a text
    if mask is not None and mask.shape[1] != length:
        mask = None
    if assists and (trace := trace_of(kwargs.get("past_key_values"))) is not None and trace.prompt_length is not None:
        # An assistant is called anew for every few tokens that follow the prompt.
        cut = trace.prompt_length
        ids = ids[:, :cut] if ids is not None and ids.shape[1] == length else None
        mask, length = None if mask is None else mask[:, :cut], cut
    return Prompt(length, ids, mask, embeddings is not None, assists)
