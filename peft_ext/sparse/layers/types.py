"""Layer classes of one method, made from those here."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..neurons import is_convolution
from .base import SparseLayer
from .conv import SparseConv
from .linear import SparseLinear


@dataclass(frozen=True)
class LayerTypes:
    """
    The classes that hold a method's adapters. Every method has its own, so that the adapters of one method can be
    told from another's around the same layer.

    Attributes:
        layer: what all of them are instances of; PEFT calls it `tuner_layer_cls`.
        linear, conv: one per kind of base layer.
    """

    layer: type[SparseLayer]
    linear: type[SparseLinear]
    conv: type[SparseConv]

    @classmethod
    def of_method(cls, method: str, prefix: str, module: str) -> LayerTypes:
        """
        Make the classes, and put them into a module so that layers can be pickled.

        Args:
            method (`str`): how the classes' names begin, such as `"NeuroAda"`: `NeuroAdaLinear`, …
            prefix (`str`): what PEFT prefixes the method's parameters with, such as `"neuroada_"`.
            module (`str`): name of the module that defines the method's model.
        """
        names: dict[str, Any] = {"adapter_layer_names": (f"{prefix}delta",), "__module__": module}

        def make(kind: str, *bases: type, doc: str) -> Any:
            made = type(f"{method}{kind}", bases, {**names, "__qualname__": f"{method}{kind}", "__doc__": doc})
            setattr(sys.modules[module], made.__name__, made)
            return made

        layer = make("Layer", SparseLayer, doc=f"A layer with adapters of {method} in `{prefix}delta`.")
        # PEFT finds adapted linear layers, for "all-linear", by this word in the name of the class.
        linear = make("Linear", layer, SparseLinear, doc=f"A linear layer with adapters of {method}.")
        conv = make("Conv", layer, SparseConv, doc=f"A convolution with adapters of {method}.")
        return cls(layer, linear, conv)

    def for_base(self, base_layer: nn.Module) -> type[SparseLayer]:
        """The class for a base layer."""
        return self.conv if is_convolution(base_layer) else self.linear
