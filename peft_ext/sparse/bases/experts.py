"""The fused weights of a mixture's experts: one parameter `[experts, rows, fan_in]`, or `[experts, fan_in, rows]`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .part import Part
from .sharded import shape_of


# Classes without transformers' `use_experts_implementation`, which notes the layout on the module: whether a neuron is
# a column.
_TRANSPOSED = {"Llama4TextExperts": True}
_BANKS = ("gate_up_proj", "up_proj", "down_proj")


def bank_names(module: nn.Module) -> tuple[str, ...]:
    """
    The parameters of a module of experts that hold the weights of one layer of each expert; none if the module is no
    such one, or if we don't know how it computes: weights that are packed, in 8 bits without scales or of an unknown
    layout.
    """
    if getattr(module, "is_transposed", _TRANSPOSED.get(type(module).__name__)) is None:
        return ()
    number = getattr(module, "num_experts", None)
    fused = [name for name, p in module._parameters.items() if is_fused(p) and not name.endswith("_scale_inv")]
    named = tuple(name for name in fused if name in _BANKS and shape_of(getattr(module, name))[0] == number)
    readable = all(_is_real(getattr(module, name)) or _scale(module, name) is not None for name in named)
    return named if len(named) == len(fused) and readable else ()


def is_fused(parameter: Tensor | None) -> bool:
    """Whether a parameter holds a matrix for each of several experts."""
    return parameter is not None and len(shape_of(parameter)) == 3


def scale_of(base_layer: Any) -> Tensor | None:
    """What a layer's weight in 8-bit floats is multiplied by, as transformers' `FineGrainedFP8Config` leaves it."""
    if isinstance(base_layer, ExpertBank):
        return _scale(base_layer.owner, base_layer.name)
    return _scale(base_layer, "weight")


def _scale(module: nn.Module, name: str) -> Tensor | None:
    parameter, scale = (module._parameters.get(key) for key in (name, f"{name}_scale_inv"))
    if parameter is None or not parameter.is_floating_point() or parameter.element_size() > 1:
        return None
    return scale


def _is_real(parameter: Any) -> bool:
    return parameter.is_floating_point() and parameter.element_size() > 1


class ExpertBank(Part):
    """
    One layer of every expert of a module: a neuron is a row of an expert's matrix, or a column of a transposed one.
    The rows of expert e are `e * rows` to `(e + 1) * rows`.

    Args:
        experts (`nn.Module`): the module.
        name (`str`): one of its [`bank_names`].

    Attributes:
        number (`int`): experts.
        rows (`int`): neurons of one expert.
        is_transposed (`bool`): whether a neuron is a column.
    """

    def __init__(self, experts: nn.Module, name: str) -> None:
        super().__init__(experts, name)
        self.is_transposed = bool(getattr(experts, "is_transposed", _TRANSPOSED.get(type(experts).__name__)))
        self.number, *matrix = shape_of(self.parameter)
        self.in_features, self.rows = matrix if self.is_transposed else reversed(matrix)
        self.out_features = self.number * self.rows

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self.owner, f"{self.name}_bias", None)
        return None if bias is None else bias.view(-1)

    def neurons(self, tensor: Tensor) -> Tensor:
        """A tensor in the shape of the weight as `[experts, rows, fan_in]`: a view."""
        return tensor.transpose(1, 2) if self.is_transposed else tensor

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Rows of x `[tokens, fan_in]`, sorted by expert, where `ends` says where those of each one end."""
        raise NotImplementedError(f"'{self.name}' is computed by the {type(self.owner).__name__} that it is in.")
