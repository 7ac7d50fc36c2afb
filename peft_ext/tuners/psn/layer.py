"""The layers of PSN: by their classes, adapters of PSN are told from those of other methods."""

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


class PSNLayer(SparseLayer):
    """A layer with adapters of PSN in `psn_delta`."""

    adapter_layer_names = ("psn_delta",)


class PSNLinear(PSNLayer, SparseLinear):
    """A linear layer with adapters of PSN."""


class PSNConv(PSNLayer, SparseConv):
    """A convolution with adapters of PSN."""


class PSNExpertBank(PSNLayer, SparseExpertBank):
    """A layer of fused experts with adapters of PSN."""


class PSNMultiheadAttention(SparseMultiheadAttention):
    """An `nn.MultiheadAttention` with adapters of PSN on its projections."""


class PSNExperts(SparseExperts):
    """Fused experts with adapters of PSN."""


LAYERS = LayerTypes(PSNLayer, PSNLinear, PSNConv, PSNMultiheadAttention, PSNExpertBank, PSNExperts)
