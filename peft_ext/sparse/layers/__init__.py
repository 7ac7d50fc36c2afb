"""Base layers with sparse adapters: which path computes them, how adapters merge and unmerge."""

from .attention import SparseMultiheadAttention
from .base import BASE_ADAPTER, SparseLayer
from .biases import part_biases
from .composite import SparseComposite
from .conv import SparseConv
from .experts import SparseExpertBank, SparseExperts
from .linear import SparseLinear
from .types import LayerTypes, weights_of_layer


__all__ = [
    "BASE_ADAPTER",
    "LayerTypes",
    "SparseComposite",
    "SparseConv",
    "SparseExpertBank",
    "SparseExperts",
    "SparseLayer",
    "SparseLinear",
    "SparseMultiheadAttention",
    "part_biases",
    "weights_of_layer",
]
