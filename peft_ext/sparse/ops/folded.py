"""The folded path: the values sit inside the base weight while a product runs, so only their gradient costs extra.

Forward and input gradient are the base layer's own dense products. The values are written into the weight at the
support just before a product and the original bits are written back right after it, inside one op: whoever reads the
weight between two ops (a state dict, a copy, a merge, another adapter) sees the original.
"""

from __future__ import annotations

from .bypass import sparse_grad_values
from .composed import linear_with
from .folding import folded_in


# `(W + S(values)) x + b`, see `linear_with`; the weight is bit for bit the same afterwards.
folded = linear_with("folded", folded_in, sparse_grad_values)
