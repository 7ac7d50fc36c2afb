"""Base layers with sparse adapters: which path computes them, how adapters merge and unmerge."""

from .base import BASE_ADAPTER, SparseLayer
from .conv import SparseConv
from .linear import SparseLinear
from .types import LayerTypes


__all__ = ["BASE_ADAPTER", "LayerTypes", "SparseConv", "SparseLayer", "SparseLinear"]
