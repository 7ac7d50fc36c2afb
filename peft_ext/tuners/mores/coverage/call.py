"""One call to the model: its tokens, and how many the cache holds before them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from .trace import Trace, cached_tokens, trace_of


MASK_ARGUMENT = "visual_token_mask"


@dataclass
class Call:
    """One call to the model."""

    # Shape of the decoder's states
    rows: int
    tokens: int
    start: int  # tokens in the cache before
    device: torch.device  # of the inputs
    # The arguments; `None` if not passed
    input_ids: Tensor | None
    attention_mask: Any
    position_ids: Any
    labels: Any
    learns: bool  # whether a language model is trained by it
    visual_token_mask: Any
    cache: Any  # that was passed
    trace: Trace  # of what is in it
    visual: tuple[Tensor, int] | None = None  # what [`~coverage.visual.visual_tokens_of`] has found

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.tokens

    @property
    def known_past(self) -> bool:
        """Whether all tokens in the cache came from calls of the adapted model."""
        return self.trace.length >= self.start


def read_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], visual_token_mask: Any) -> Call:
    """
    Read the arguments of a call to a model, or to one of the modules inside it that lead to the decoder.

    Raises:
        `RuntimeError`: if they do not tell the tokens, or what is in the cache.
    """
    ids, embeddings = (argument(module, args, kwargs, name) for name in ("input_ids", "inputs_embeds"))
    tensor = ids if embeddings is None else embeddings
    if not isinstance(tensor, Tensor) or tensor.dim() < 2:
        raise RuntimeError(
            "MoReS cannot tell which tokens to steer, since the model was called without input_ids or inputs_embeds."
        )
    cache = argument(module, args, kwargs, "past_key_values")
    if cache is None:  # Mamba's has another name
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
    start = cached_tokens(cache)
    if start is None or kwargs.get("cache") is not None:
        raise RuntimeError(
            f"MoReS cannot tell which tokens are in the cache, a {type(kwargs.get('cache', cache)).__name__}. Use "
            "generate() instead of continuous batching, and a cache that this model has filled."
        )
    rows, tokens = tensor.shape[:2]
    if isinstance(visual_token_mask, Tensor) and visual_token_mask.dim() == 2 and start == 0:
        tokens = max(tokens, visual_token_mask.shape[1])  # the model puts visual tokens between those of input_ids
    return Call(
        rows=rows,
        tokens=tokens,
        start=start,
        device=tensor.device,
        input_ids=ids,
        attention_mask=argument(module, args, kwargs, "attention_mask"),
        position_ids=argument(module, args, kwargs, "position_ids"),
        labels=argument(module, args, kwargs, "labels"),
        learns=module.training and getattr(module, "get_output_embeddings", lambda: None)() is not None,
        visual_token_mask=visual_token_mask,
        cache=cache,
        trace=(trace_of(cache) if start else None) or Trace(),
    )


@lru_cache(maxsize=256)
def _parameters(forward: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)


def argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """An argument of a module's forward, whether it was passed by name or by position."""
    if name in kwargs:
        return kwargs[name]
    names = _parameters(type(module).forward)[1:]  # without self
    return args[names.index(name)] if name in names and names.index(name) < len(args) else None
