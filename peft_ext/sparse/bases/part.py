"""A weight inside a module that multiplies by it without calling a layer, seen as a layer of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Part(nn.Module):
    """
    Base of [`Projection`] and [`ExpertBank`]. It owns nothing, so the module's parameters keep their names and are
    moved, cast and saved once.

    Args:
        owner (`nn.Module`): the module whose parameter holds the weight.
        name (`str`): of the part.

    Attributes:
        in_features, out_features (`int`): inputs per neuron, and neurons.
    """

    owner: Any
    in_features: int
    out_features: int

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # not registered as a submodule
        self.name = name

    @property
    def parameter_name(self) -> str:
        """Name of the owner's parameter that holds the weight."""
        return self.name

    @property
    def holder(self) -> tuple[nn.Module, str]:
        """The module that has this parameter itself, and its name there."""
        path, _, name = self.parameter_name.rpartition(".")
        return self.owner.get_submodule(path), name

    @property
    def parameter(self) -> Tensor:
        """What holds the weight; while FSDP has it unsharded, a plain tensor."""
        module, name = self.holder
        return getattr(module, name)

    def rows_of(self, tensor: Tensor) -> Tensor:
        """This part of a tensor in the shape of `parameter`, such as a gradient: a view."""
        return tensor

    @property
    def weight(self) -> Tensor:
        """The owner's own memory."""
        return self.rows_of(self.parameter)

    @property
    def bias(self) -> Tensor | None:
        """`[out_features]`, the owner's own memory."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.name}, in_features={self.in_features}, out_features={self.out_features}"
