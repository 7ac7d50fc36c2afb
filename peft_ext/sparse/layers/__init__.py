"""Base layers with sparse adapters: which path computes them, how adapters merge and unmerge."""

from .attention import SparseMultiheadAttention, attention_biases
from .base import BASE_ADAPTER, SparseLayer
from .conv import SparseConv
from .linear import SparseLinear
from .types import LayerTypes, weights_of_layer


__all__ = [
    "BASE_ADAPTER",
    "LayerTypes",
    "SparseConv",
    "SparseLayer",
    "SparseLinear",
    "SparseMultiheadAttention",
    "attention_biases",
    "weights_of_layer",
]
