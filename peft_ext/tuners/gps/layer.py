"""The layers of GPS: by their classes, adapters of GPS are told from those of other methods."""

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


class GPSLayer(SparseLayer):
    """A layer with adapters of GPS in `gps_delta`."""

    adapter_layer_names = ("gps_delta",)


class GPSLinear(GPSLayer, SparseLinear):
    """A linear layer with adapters of GPS."""


class GPSConv(GPSLayer, SparseConv):
    """A convolution with adapters of GPS."""


class GPSExpertBank(GPSLayer, SparseExpertBank):
    """A layer of fused experts with adapters of GPS."""


class GPSMultiheadAttention(SparseMultiheadAttention):
    """An `nn.MultiheadAttention` with adapters of GPS on its projections."""


class GPSExperts(SparseExperts):
    """Fused experts with adapters of GPS."""


LAYERS = LayerTypes(GPSLayer, GPSLinear, GPSConv, GPSMultiheadAttention, GPSExpertBank, GPSExperts)
