"""For the time of a knockout: an attention implementation that takes any mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from .architecture import Architecture


EDITABLE = ("sdpa", "eager")


def implementation_of(architecture: Architecture) -> str:
    """The decoder's attention implementation, as transformers names it."""
    return str(architecture.text_config._attn_implementation)


@contextmanager
def editable_attention(architecture: Architecture) -> Iterator[str]:
    """
    Switch a decoder whose implementation takes no edited masks (flash, flex) to sdpa, or to eager where it has no
    sdpa, and back on exit. The vision tower keeps its own.

    Yields:
        `str`: `"sdpa"` or `"eager"`.
    """
    before = implementation_of(architecture)
    if before in EDITABLE:
        yield before
        return
    for name in EDITABLE:
        try:
            _switch(architecture, name)
        except (ValueError, ImportError):
            continue
        if implementation_of(architecture) == name:
            break
    else:
        raise ValueError(
            f"{type(architecture.model).__name__} runs its decoder with attention {before!r}, which takes no edited "
            'masks, and refuses sdpa and eager; load it with attn_implementation="eager".'
        )
    try:
        yield implementation_of(architecture)
    finally:
        _restore(architecture, before)


def _switch(architecture: Architecture, name: str) -> None:
    model: Any = architecture.model
    own = model.config
    keys = [key for key in getattr(own, "sub_configs", {}) if getattr(own, key, None) is architecture.text_config]
    model.set_attn_implementation({keys[0]: name} if keys else name)


def _restore(architecture: Architecture, name: str) -> None:
    with suppress(ValueError, ImportError):
        _switch(architecture, name)
    if implementation_of(architecture) != name:  # what was set by hand is put back by hand
        architecture.text_config._attn_implementation_internal = name
