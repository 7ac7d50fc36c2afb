"""The projections inside an `nn.MultiheadAttention`, each seen as a linear layer."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class Projection(nn.Module):
    """
    One projection of an attention module: a linear layer whose weight is the attention's, or a slice of rows of it.
    It owns nothing, so the attention's parameters keep their names and are moved, cast and saved once.

    Args:
        attention (`nn.MultiheadAttention`): the module.
        name (`str`): one of `PROJECTIONS`.
    """

    attention: Any

    def __init__(self, attention: nn.MultiheadAttention, name: str) -> None:
        super().__init__()
        self.__dict__["attention"] = attention  # not registered as a submodule
        self.name = name
        self.out_features = attention.embed_dim
        widths = {"k_proj": attention.kdim, "v_proj": attention.vdim}
        self.in_features: int = widths.get(name) or attention.embed_dim

    @property
    def parameter_name(self) -> str:
        """Name of the attention's parameter that holds the weight."""
        if self.name == "out_proj":
            return "out_proj.weight"
        return "in_proj_weight" if self.attention.in_proj_weight is not None else f"{self.name}_weight"

    def rows_of(self, tensor: Tensor) -> Tensor:
        """This projection's rows of a tensor in the shape of the attention's parameter, such as a gradient: a view."""
        if self.parameter_name != "in_proj_weight":
            return tensor
        start = PROJECTIONS.index(self.name) * self.out_features
        return tensor[start : start + self.out_features]

    @property
    def parameter(self) -> Tensor:
        """The attention's parameter that holds the weight; while FSDP has it unsharded, a plain tensor."""
        owner = self.attention.out_proj if self.name == "out_proj" else self.attention
        return getattr(owner, self.parameter_name.rpartition(".")[2])

    @property
    def weight(self) -> Tensor:
        """`[out_features, in_features]`, the attention's own memory."""
        return self.rows_of(self.parameter)

    @property
    def bias(self) -> Tensor | None:
        """`[out_features]`, the attention's own memory."""
        if self.name == "out_proj":
            return self.attention.out_proj.bias
        bias = self.attention.in_proj_bias
        if bias is None:
            return None
        start = PROJECTIONS.index(self.name) * self.out_features
        return bias[start : start + self.out_features]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.name}, in_features={self.in_features}, out_features={self.out_features}"
