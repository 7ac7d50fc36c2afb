"""Linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..bases.neurons import neuron_view
from ..ops import choose_backend, dense, folded
from ..ops.reference import sparse_product
from .base import SparseLayer


class SparseLinear(SparseLayer):
    """A linear layer (`nn.Linear`, transformers' `Conv1D`, or quantised) with sparse adapters."""

    def _with_base(self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        delta = self.ready(adapter_name, x)
        support = delta.support
        weight = self._plain_weight(delta)
        if weight is not None:
            weight = neuron_view(self.get_base_layer(), weight)
        path = choose_backend(
            self.backends[adapter_name], x, weight, support.entries, self.out_features, support.is_table
        )
        if weight is None or path == "bypass":
            # A plain linear layer does not need its output for backward, and nobody else has seen it yet.
            owned = weight is not None and type(self.base_layer) in (nn.Linear, Conv1D)
            return delta(self._base_result(x, *args, **kwargs), x, owned=owned)
        bias = self._bias_with(delta)
        products: dict[str, Callable[..., Tensor]] = {"folded": folded, "dense": dense, "reference": sparse_product}
        return products[path](x, weight, bias, delta.values, delta.indices, delta.offsets)
