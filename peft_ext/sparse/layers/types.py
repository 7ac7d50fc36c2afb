"""Layer classes of one method, made from those here."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...hf.internals import BaseTunerLayer, QuantizationBackend
from ..bases.experts import bank_names
from ..bases.neurons import is_convolution
from .attention import SparseMultiheadAttention
from .base import SparseLayer
from .composite import SparseComposite
from .conv import SparseConv
from .experts import SparseExpertBank, SparseExperts
from .linear import SparseLinear


@dataclass(frozen=True)
class LayerTypes:
    """
    The classes that hold a method's adapters. Every method has its own, so that the adapters of one method can be
    told from another's around the same layer.

    Attributes:
        layer: what all of them are instances of; PEFT calls it `tuner_layer_cls`.
        linear, conv: one per kind of base layer.
        attention: for `nn.MultiheadAttention`, around linear layers.
        bank: a layer of all experts.
        experts: for fused experts, around their layers.
    """

    layer: type[SparseLayer]
    linear: type[SparseLinear]
    conv: type[SparseConv]
    attention: type[SparseMultiheadAttention]
    bank: type[SparseExpertBank]
    experts: type[SparseExperts]

    @property
    def own(self) -> tuple[type, ...]:
        """What adapters of this method are around targets."""
        return self.layer, self.attention, self.experts

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
        bank = make("ExpertBank", layer, SparseExpertBank, doc=f"A layer of fused experts with adapters of {method}.")
        names = {**names, "adapter_layer_names": ()}
        doc = f"An `nn.MultiheadAttention` with adapters of {method} on its projections."
        attention = make("MultiheadAttention", SparseMultiheadAttention, doc=doc)
        experts = make("Experts", SparseExperts, doc=f"Fused experts with adapters of {method}.")
        return cls(layer, linear, conv, attention, bank, experts)

    def around(self, target: nn.Module, backend: QuantizationBackend | None) -> SparseLayer | SparseComposite:
        """A layer of the right class around a target, which may be another tuner's layer."""
        base: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, nn.MultiheadAttention):
            return self.attention(base, self.linear)
        if bank_names(base):
            return self.experts(base, self.bank)
        return (self.conv if is_convolution(base) else self.linear)(target, backend)


def weights_of_layer(name: str, layer: SparseLayer | SparseComposite) -> dict[str, SparseLayer]:
    """The adapted weights of a layer by name: as [`weights_of`] names those of its base layer."""
    if isinstance(layer, SparseComposite):
        return {f"{name}.{part}": inner for part, inner in layer.parts.items()}
    return {name: layer}
