"""Scale what adapters add, at inference: the verbs that LoRA layers have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..delta import SparseDelta


class ScalingMixin:
    """`set_scale`, `scale_layer` and `unscale_layer` of a sparse layer. Scales are not saved."""

    deltas: MutableMapping[str, SparseDelta]
    active_adapters: list[str]
    merged_adapters: list[str]
    get_base_layer: Callable[[], Any]

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """
        Let an adapter add `scale` times what it was trained to add.

        Raises:
            `ValueError`: if the scale is no number, or the adapter is merged.
        """
        if type(scale) not in (int, float):
            raise ValueError(f"scale={scale!r} must be a number.")
        if adapter_name in self.merged_adapters:
            raise ValueError(
                f"Adapter '{adapter_name}' is merged, so its scale is fixed; call unmerge_adapter() first."
            )
        if adapter_name in self.deltas:
            self._delta(adapter_name).scale = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters."""
        for name in self._active_here():
            self.set_scale(name, self._delta(name).scale * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of the active adapters, or set them to 1."""
        for name in self._active_here():
            self.set_scale(name, 1.0 if scale is None else self._delta(name).scale / scale)

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.deltas]

    def _delta(self, adapter_name: str) -> SparseDelta:
        delta = self.deltas[adapter_name]
        return getattr(delta, "_fsdp_wrapped_module", delta)


def _distinct(model: nn.Module, adapter_name: str | None) -> list[tuple[ScalingMixin, str, SparseDelta]]:
    """Layers, adapters and deltas; those that share a weight once."""
    seen: dict[int, tuple[ScalingMixin, str, SparseDelta]] = {}
    for layer in model.modules():
        if isinstance(layer, ScalingMixin):
            for name in layer.deltas if adapter_name is None else [adapter_name]:
                if name in layer.deltas:
                    seen.setdefault(id(layer._delta(name)), (layer, name, layer._delta(name)))
    if not seen:
        which = "no sparse adapters" if adapter_name is None else f"no sparse adapter {adapter_name!r}"
        raise ValueError(f"The model has {which}, so there is nothing to scale.")
    return list(seen.values())


def set_scale(model: nn.Module, scale: float, adapter_name: str | None = None) -> None:
    """
    Set the scale of sparse adapters: they add `scale` times what they were trained to add. 0 gives the base model, 1
    the adapter as trained.

    The scale applies to outputs, merging and exported weights of this model. It is not saved.

    Args:
        model (`torch.nn.Module`):
            The adapted model.
        scale (`float`):
            The factor.
        adapter_name (`str`, *optional*):
            Name of the adapter; by default all.

    Raises:
        `ValueError`: If there is no such adapter, it is merged, or the scale is not a number.

    Example:

        ```py
        >>> from peft_ext import set_scale

        >>> set_scale(model, 0.5)
        ```
    """
    for layer, name, _ in _distinct(model, adapter_name):
        layer.set_scale(name, scale)


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """
    Context manager that multiplies the scales of all sparse adapters, as PEFT's helper of this name does for LoRA.

    Args:
        model (`torch.nn.Module`):
            The adapted model.
        multiplier (`float`):
            The factor. Between 0 and 1 it interpolates between the base model and the adapted one.

    Raises:
        `ValueError`: As for [`set_scale`].

    Example:

        ```py
        >>> from peft_ext import rescale_adapter_scale

        >>> with rescale_adapter_scale(model, 0.5):
        ...     output = model(**inputs)
        ```
    """
    before = [(layer, name, delta.scale) for layer, name, delta in _distinct(model, None)]
    try:
        for layer, name, scale in before:
            layer.set_scale(name, scale * multiplier)
        yield
    finally:
        for layer, name, scale in before:
            if name in layer.deltas:
                layer._delta(name).scale = scale
