"""The four ways to compute a layer, under one signature."""

import torch.nn.functional as F

from peft_ext.sparse.ops import bypass, dense, folded
from peft_ext.sparse.ops.reference import sparse_product

from .._asserts import Product
from .._inputs import SHAPES


def _bypass(x, weight, bias, values, support):
    return bypass(F.linear(x, weight, bias), x, values, support.indices, support.offsets, *support.transposed())


def _composed(product):
    return lambda x, weight, bias, values, support: product(x, weight, bias, values, support.indices, support.offsets)


PATHS: dict[str, Product] = {
    "bypass": _bypass,
    "folded": _composed(folded),
    "dense": _composed(dense),
    "reference": _composed(sparse_product),
}
PATHS_AND_SHAPES = [(path, name) for path in PATHS for name in SHAPES]
