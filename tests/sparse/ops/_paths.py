"""The four ways to compute a layer, under one signature."""

import torch.nn.functional as F

from peft_ext.sparse.ops import bypass, dense, folded
from peft_ext.sparse.ops.reference import sparse_product

from .._asserts import Product
from .._inputs import SHAPES


def _bypass(x, weight, bias, values, support):
    entries, column_offsets = support.transposed()
    result = F.linear(x, weight, bias)
    return bypass(result, x, values, support.indices, support.offsets, entries, column_offsets)


def _folded(x, weight, bias, values, support):
    return folded(x, weight, bias, values, support.indices, support.offsets)


def _dense(x, weight, bias, values, support):
    return dense(x, weight, bias, values, support.indices, support.offsets)


def _reference(x, weight, bias, values, support):
    return sparse_product(x, weight, bias, values, support.indices, support.offsets)


PATHS: dict[str, Product] = {"bypass": _bypass, "folded": _folded, "dense": _dense, "reference": _reference}
PATHS_AND_SHAPES = [(path, name) for path in PATHS for name in SHAPES]
