"""The projections inside an `nn.MultiheadAttention`, each seen as a linear layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .part import Part


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class Projection(Part):
    """
    One of the `PROJECTIONS` of an attention module: a linear layer whose weight is the attention's, or a slice of rows
    of it.
    """

    def __init__(self, attention: nn.MultiheadAttention, name: str) -> None:
        super().__init__(attention, name)
        self.out_features = attention.embed_dim
        widths = {"k_proj": attention.kdim, "v_proj": attention.vdim}
        self.in_features: int = widths.get(name) or attention.embed_dim

    @property
    def parameter_name(self) -> str:
        if self.name == "out_proj":
            return "out_proj.weight"
        return "in_proj_weight" if self.owner.in_proj_weight is not None else f"{self.name}_weight"

    def rows_of(self, tensor: Tensor) -> Tensor:
        return tensor[self._packed] if self.parameter_name == "in_proj_weight" else tensor

    @property
    def bias(self) -> Tensor | None:
        if self.name == "out_proj":
            return self.owner.out_proj.bias
        bias = self.owner.in_proj_bias
        return None if bias is None else bias[self._packed]

    @property
    def _packed(self) -> slice:
        """Its rows of what holds three projections."""
        start = PROJECTIONS.index(self.name) * self.out_features
        return slice(start, start + self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
