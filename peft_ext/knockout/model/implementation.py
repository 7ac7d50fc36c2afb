"""For the time of a measurement: an attention implementation that takes any mask, or gives its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from .architecture import Architecture


EDITABLE = ("sdpa", "eager")


def editable_attention(architecture: Architecture) -> AbstractContextManager[str]:
    """[`switched_attention`] of a decoder to an implementation that takes edited masks, unlike flash and flex."""
    return switched_attention(architecture.model, architecture.text_config, EDITABLE)


@contextmanager
def switched_attention(model: Any, text_config: Any, names: Sequence[str]) -> Iterator[str]:
    """
    Switch a decoder whose attention implementation is none of these to the first that it has, and back on exit. The
    vision tower keeps its own.

    Yields:
        `str`: the implementation, as transformers names it.
    """
    before = text_config._attn_implementation
    if before in names:
        yield before
        return
    refusal: Exception | None = None
    for name in names:
        try:
            _switch(model, text_config, name)
        except (ValueError, ImportError) as error:
            refusal = error
        if text_config._attn_implementation == name:
            break
    else:
        raise ValueError(
            f"{type(model).__name__} runs its decoder with attention {before!r}, but {' or '.join(names)} is needed, "
            'and it refuses to switch; load it with attn_implementation="eager".'
        ) from refusal
    try:
        yield name
    finally:
        with suppress(ValueError, ImportError):
            _switch(model, text_config, before)
        if text_config._attn_implementation != before:  # what was set by hand is put back by hand
            text_config._attn_implementation_internal = before


def _switch(model: Any, text_config: Any, name: str) -> None:
    own = model.config
    keys = [key for key in getattr(own, "sub_configs", {}) if getattr(own, key, None) is text_config]
    model.set_attn_implementation({keys[0]: name} if keys else name)
