"""The layers of NeuroAda: by their classes, adapters of NeuroAda are told from those of other methods."""

from __future__ import annotations

from ...sparse.layers import (
    LayerTypes,
    SparseConv,
    SparseExpertBank,
    SparseExperts,
    SparseLayer,
    SparseLinear,
    SparseMultiheadAttention,
)


class NeuroAdaLayer(SparseLayer):
    """A layer with adapters of NeuroAda in `neuroada_delta`."""

    adapter_layer_names = ("neuroada_delta",)


class NeuroAdaLinear(NeuroAdaLayer, SparseLinear):
    """A linear layer with adapters of NeuroAda."""


class NeuroAdaConv(NeuroAdaLayer, SparseConv):
    """A convolution with adapters of NeuroAda."""


class NeuroAdaExpertBank(NeuroAdaLayer, SparseExpertBank):
    """A layer of fused experts with adapters of NeuroAda."""


class NeuroAdaMultiheadAttention(SparseMultiheadAttention):
    """An `nn.MultiheadAttention` with adapters of NeuroAda on its projections."""


class NeuroAdaExperts(SparseExperts):
    """Fused experts with adapters of NeuroAda."""


LAYERS = LayerTypes(
    NeuroAdaLayer, NeuroAdaLinear, NeuroAdaConv, NeuroAdaMultiheadAttention, NeuroAdaExpertBank, NeuroAdaExperts
)
