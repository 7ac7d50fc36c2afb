"""Layer classes of one method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ...hf.internals import QuantizationBackend
from ..bases.experts import bank_names
from ..bases.neurons import base_of, is_convolution
from .attention import SparseMultiheadAttention
from .base import SparseLayer
from .composite import SparseComposite
from .conv import SparseConv
from .experts import SparseExpertBank, SparseExperts
from .linear import SparseLinear


@dataclass(frozen=True)
class LayerTypes:
    """
    The classes that hold a method's adapters. Every method has its own, so that the adapters of one method can be told
    from another's around the same layer.
    """

    layer: type[SparseLayer]  # what all of them are instances of; PEFT calls it `tuner_layer_cls`
    linear: type[SparseLinear]
    conv: type[SparseConv]
    attention: type[SparseMultiheadAttention]  # for `nn.MultiheadAttention`, around linear layers
    bank: type[SparseExpertBank]  # a layer of all experts
    experts: type[SparseExperts]  # for fused experts, around their layers

    @property
    def own(self) -> tuple[type, ...]:
        """What adapters of this method are around targets."""
        return self.layer, self.attention, self.experts

    def around(
        self, target: nn.Module, backend_of: Callable[[nn.Module], QuantizationBackend | None]
    ) -> SparseLayer | SparseComposite:
        """A layer of the right class around a target, which may be another tuner's layer. `backend_of` gives PEFT's
        access to a quantised base layer."""
        base = base_of(target)
        if isinstance(base, nn.MultiheadAttention):
            return self.attention(base, self.linear)
        if bank_names(base):
            return self.experts(base, self.bank, backend_of)
        return (self.conv if is_convolution(base) else self.linear)(target, backend_of(base))


def weights_of_layer(name: str, layer: SparseLayer | SparseComposite) -> dict[str, SparseLayer]:
    """The adapted weights of a layer by name: as [`weights_of`] names those of its base layer."""
    if isinstance(layer, SparseComposite):
        return {f"{name}.{part}": inner for part, inner in layer.parts.items()}
    return {name: layer}
