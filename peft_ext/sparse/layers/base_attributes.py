"""Attributes of a layer that models read, passed through by the adapted layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class BaseAttributes:
    """
    Lets an adapted layer answer for its base layer: `stride` of a convolution, `batch_first` of an attention, and what
    a subclass or the model itself has put there. Models read such attributes, and torch's encoder does.

    The base layer's submodules have names of their own below the adapted layer, and names that begin with an
    underscore belong to whoever set them, such as accelerate's hooks: those stay hidden.
    """

    get_base_layer: Callable[[], Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if name.startswith("_") or name == "base_layer":  # the latter before it is set
                raise
            base = self.get_base_layer()
            if name in base._modules or not hasattr(base, name):
                raise
            return getattr(base, name)
