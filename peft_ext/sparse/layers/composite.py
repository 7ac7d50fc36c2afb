"""A module with several weights that it uses without calling layers, each adapted as a layer of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...hf.internals import BaseTunerLayer
from ..bases.bank_product import WatchedForward
from .base import SparseLayer
from .base_attributes import BaseAttributes


class SparseComposite(BaseAttributes, nn.Module, BaseTunerLayer):
    """
    Base of the adapted attention and experts, with an adapted layer for each of their weights. PEFT's verbs reach the
    layers inside too, so here they do nothing.
    """

    adapter_layer_names: tuple[str, ...] = ()  # they are on the layers
    other_param_names: tuple[str, ...] = ()
    base_layer: Any

    def __init__(self, base_layer: nn.Module, layers: dict[str, SparseLayer]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.part_names = tuple(layers)
        for name, layer in layers.items():
            setattr(self, name, layer)

    @property
    def parts(self) -> dict[str, Any]:
        """The adapted layers by name."""
        return {name: self._modules[name] for name in self.part_names}

    @property
    def merged_adapters(self) -> list[str]:
        """Adapters merged into any part."""
        return list(dict.fromkeys(name for layer in self.parts.values() for name in layer.merged_adapters))

    @property
    def active_adapter(self) -> str | list[str]:
        """That of the parts, which is what PEFT sets."""
        first: Any = self._modules[self.part_names[0]]
        return first.active_adapter

    def _get_available_adapters(self) -> set[str]:
        return {name for layer in self.parts.values() for name in layer.deltas}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing to do: PEFT merges the parts, which it visits as well."""

    def unmerge(self) -> None:
        """Nothing to do: PEFT unmerges the parts, which it visits as well."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module without its adapters."""
        if merge:
            for layer in self.parts.values():
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer

    def scale_layer(self, scale: float) -> None:
        """Nothing to do: the parts are layers of their own."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """Nothing to do: the parts are layers of their own."""

    def _is_idle(self) -> bool:
        """Whether the module can run as it is."""
        layers = self.parts.values()
        if self.disable_adapters:
            for layer in layers:
                if layer.merged:
                    layer.unmerge()
            return True
        return all(layer.merged or not set(layer.active_adapters) & set(layer.deltas) for layer in layers)

    def _check_called_whole(self) -> None:
        """While adapters are active the module itself is not called."""
        base = self.base_layer
        replaced = "forward" in vars(base) and not isinstance(vars(base)["forward"], WatchedForward)
        if base._forward_hooks or base._forward_pre_hooks or replaced:
            raise NotImplementedError(
                f"The {type(base).__name__} has hooks or a replaced forward (as offloading installs), which would not "
                "run while adapters are active. Put hooks on the adapted module around it, or keep it on one device."
            )
