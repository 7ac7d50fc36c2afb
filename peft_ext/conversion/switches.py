"""Copy the switches of adapters (active, disabled, trainable) from one kind of layer to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


# Where layers keep their adapters by name: SHiRA's, Super-Tuning's, ours, and modules that are trained whole.
_CONTAINERS = ("shira_weight", "supertuning_values", "neuroada_delta", "modules_to_save")


@dataclass
class _Layer:
    """Switches of one layer: its active adapters, whether they are disabled, and what each one trains."""

    active: str | list[str]
    disabled: bool
    trainable: dict[str, list[bool]]


class Switches:
    """
    Of each layer of a base model which adapters are active, and whether they are disabled; of each parameter whether
    it is trainable; of each module whether it is in training mode.
    """

    def __init__(self, base: nn.Module) -> None:
        self.layers: dict[str, _Layer] = {}
        for name, layer in base.named_modules():
            adapters = _adapters(layer)
            if adapters:  # a layer whose last adapter was deleted will be a layer of the base again
                trainable = {key: [p.requires_grad for p in _parameters(adapters[key])] for key in adapters}
                self.layers[name] = _Layer(layer._active_adapter, layer._disable_adapters, trainable)
        self.parameters = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
        self.modes = {name: module.training for name, module in base.named_modules()}

    def apply(self, base: nn.Module) -> None:
        """Set them on the same base model, whose layers with adapters are others now, under the same names."""
        for name, module in base.named_modules():
            module.training = self.modes.get(name, module.training)
        for parameter, trainable in self.parameters:
            parameter.requires_grad_(trainable)
        for name, before in self.layers.items():
            layer: Any = base.get_submodule(name)
            layer._active_adapter, layer._disable_adapters = before.active, before.disabled
            adapters = _adapters(layer)
            for key, flags in before.trainable.items():
                for parameter, trainable in zip(_parameters(adapters[key]), flags, strict=True):
                    parameter.requires_grad_(trainable)


def _adapters(layer: Any) -> Any:
    # Not by `getattr`: a module that is trained whole answers for the module inside.
    return next((layer._modules[name] for name in _CONTAINERS if name in layer._modules), None)


def _parameters(adapter: nn.Parameter | nn.Module) -> list[nn.Parameter]:
    return [adapter] if isinstance(adapter, nn.Parameter) else list(adapter.parameters())
