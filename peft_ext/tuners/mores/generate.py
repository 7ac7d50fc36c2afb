"""`generate` of a steered model: while it runs, the prompt is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .coverage.call import MASK_ARGUMENT
from .coverage.prompt import read_prompt
from .finder import TokenFinder


class SteeredGenerate:
    """
    Stands as `generate` on a steered model: the model's own, and `visual_token_mask` (bool, `[batch, tokens]`) may be
    passed too.
    """

    def __init__(self, generate: Callable[..., Any], finder: TokenFinder) -> None:
        self.__wrapped__ = generate  # for `inspect.signature`
        self.finder = finder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.pop(MASK_ARGUMENT, None)
        with self.finder.knows(read_prompt(args, kwargs), mask):
            return self.__wrapped__(*args, **kwargs)


def attach_generate(model: nn.Module, finder: TokenFinder) -> None:
    """Stand in for a model's `generate`, if it has one. On the model itself, so that whoever calls it is heard."""
    own = getattr(model, "generate", None)
    if callable(own):
        model.__dict__["generate"] = SteeredGenerate(own, finder)


def detach_generate(model: nn.Module) -> None:
    """Undo [`attach_generate`]."""
    generate = model.__dict__.get("generate")
    if isinstance(generate, SteeredGenerate):
        del model.__dict__["generate"]
        if generate.__wrapped__ != getattr(model, "generate", None):  # someone else's, set on the model before
            model.__dict__["generate"] = generate.__wrapped__
