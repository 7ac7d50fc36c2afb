"""Base layers seen as neurons: which types are supported, and their weight as `[rows, fan_in]`."""

from __future__ import annotations

import copy
import math
import warnings
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from ...hf.internals import BaseTunerLayer, QuantizationBackend
from .experts import ExpertBank, bank_names
from .fp8 import is_sealed
from .padding import CONVOLUTIONS, OwnPadding, has_own_forward
from .part import Part
from .projection import PROJECTIONS, Projection
from .sharded import shape_of


SUPPORTED = (
    "torch.nn.Linear, Conv1d, Conv2d, Conv3d and MultiheadAttention, transformers' Conv1D and fused experts, and "
    "quantised linear layers that PEFT has a backend for"
)


def base_of(module: nn.Module) -> Any:
    """The layer inside a tuner's layer, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def base_model_of(model: Any) -> Any:
    """The model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def weights_of(name: str, module: nn.Module) -> dict[str, Any]:
    """The layers with one weight each that a target stands for, by name: itself, an attention's projections, or the
    layers of experts."""
    if isinstance(module, nn.MultiheadAttention):
        return {f"{name}.{part}": Projection(module, part) for part in PROJECTIONS}
    return {f"{name}.{bank}": ExpertBank(module, bank) for bank in bank_names(module)} or {name: module}


def is_convolution(base_layer: nn.Module) -> bool:
    """Whether a layer is a convolution that computes what its class says, with a weight per output channel."""
    if not isinstance(base_layer, CONVOLUTIONS):
        return False
    return not has_own_forward(base_layer) or OwnPadding.of(base_layer) is not None


def is_supported(base_layer: nn.Module, backend: QuantizationBackend | None) -> bool:
    """Whether a layer has neurons that we can adapt: `nn.Linear(0, 4)` and `nn.Linear(4, 0)` have none."""
    if backend is not None:
        return backend.layer_type == "linear"
    if isinstance(base_layer, nn.MultiheadAttention) or bank_names(base_layer):
        return True
    known = isinstance(base_layer, (nn.Linear, Conv1D, Part)) or is_convolution(base_layer)
    return known and 0 not in matrix_shape(base_layer) and not is_sealed(base_layer)


def check_real(name: str, weight: Tensor) -> None:
    """
    Raises:
        `TypeError`: if a target module's weight is complex, or of whole numbers without being quantised.
    """
    if not weight.is_floating_point():
        raise TypeError(
            f"The weight of target module '{name}' is {weight.dtype}, but values are added to real floating-point "
            f"weights only. Add '{name}' to `exclude_modules`."
        )


class _Bare(nn.Module):
    """A layer as its class computes it, without hooks and what has been put on the instance."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return type(self.layer).forward(self.layer, x)


def gives_one_output(base_layer: Any) -> bool:
    """
    Whether a layer (no quantised one) gives one tensor with a number per neuron, so that an update can be added to it.

    Routers of experts (Llama 4's, PhiMoE's) are linear layers by class that give tuples; Falcon's linear layers
    compute what `nn.Linear` does in their own way. So a class with its own forward is tried out, on the meta device.
    A warning names one that can't be.
    """
    if not isinstance(base_layer, nn.Linear) or type(base_layer).forward is nn.Linear.forward:
        return True
    layer = _Bare(copy.copy(base_layer))  # which holds the attributes that its forward sets
    tensors = {
        name: torch.empty(shape_of(tensor), dtype=tensor.dtype, device="meta")
        for name, tensor in chain(layer.named_parameters(), layer.named_buffers())
    }
    for lead in ((2,), (1, 2)):  # some forwards take sequences only
        x = torch.empty(*lead, base_layer.in_features, dtype=base_layer.weight.dtype, device="meta")
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=()):
                result = torch.func.functional_call(layer, tensors, (x,))
        except Exception as error:  # it takes another input than linear layers do, or reads values
            failure = error
        else:
            return isinstance(result, Tensor) and result.shape == (*lead, base_layer.out_features)
    warnings.warn(
        f"{type(base_layer).__name__} is left out of the targets, for it is a linear layer with a forward of its own "
        f"that can't be tried out ({failure}); to adapt it, name it in `target_modules`.",
        stacklevel=2,
    )
    return False


def neuron_view(base_layer: nn.Module, weight: Tensor) -> Tensor:
    """
    The weight (or a gradient of it) as `[rows, fan_in]`: Conv1D keeps a neuron in a column, a convolution spreads one
    over its kernel. A view, but a copy of a convolution's weight in another memory format than the default. That of
    experts as `[experts, rows, fan_in]`.
    """
    if isinstance(base_layer, ExpertBank):
        return base_layer.neurons(weight)
    if isinstance(base_layer, CONVOLUTIONS):
        return weight.flatten(1)
    return weight.t() if isinstance(base_layer, Conv1D) else weight


def weight_view(base_layer: nn.Module, matrix: Tensor) -> Tensor:
    """The inverse of [`neuron_view`]: `[rows, fan_in]` in the shape of the layer's weight."""
    if isinstance(base_layer, ExpertBank):
        return base_layer.neurons(matrix.view(base_layer.number, base_layer.rows, -1))
    if isinstance(base_layer, CONVOLUTIONS):
        return matrix.view(shape_of(base_layer.weight))
    return matrix.t() if isinstance(base_layer, Conv1D) else matrix


def matrix_shape(base_layer: Any) -> tuple[int, int]:
    """Rows and fan-in of a layer, which a packed weight does not show."""
    if isinstance(base_layer, CONVOLUTIONS):
        rows, *fan_in = shape_of(base_layer.weight)
        return rows, math.prod(fan_in)
    if hasattr(base_layer, "out_features"):
        return base_layer.out_features, base_layer.in_features
    shape = shape_of(base_layer.weight)
    return (shape[1], shape[0]) if isinstance(base_layer, Conv1D) else (shape[0], shape[1])


def taps_of(base_layer: Any) -> int | None:
    """Positions of a convolution's kernel; `None` for a linear layer."""
    return math.prod(base_layer.kernel_size) if isinstance(base_layer, CONVOLUTIONS) else None


def experts_of(base_layer: Any) -> int | None:
    """Experts that a layer belongs to; `None` for other layers."""
    return base_layer.number if isinstance(base_layer, ExpertBank) else None


def has_writable_weight(base_layer: nn.Module) -> bool:
    """Whether writing into a layer's weight changes the layer: a parametrization computes it anew each time."""
    return "weight" in base_layer._parameters or isinstance(base_layer, Part)


def parameter_of(base_layer: Any) -> Tensor:
    """The parameter that holds a layer's weight; for a part of a module, its owner's parameter."""
    return base_layer.parameter if isinstance(base_layer, Part) else base_layer.weight


def is_plain(base_layer: nn.Module) -> bool:
    """Whether the layer computes `W x + b` and nothing else, so that calling it and multiplying by W are the same."""
    if type(base_layer) not in (nn.Linear, Conv1D, Projection, *CONVOLUTIONS) or "forward" in vars(base_layer):
        return False
    # While FSDP1 has weights whole, views of a flat parameter stand in their place, which nothing may write into.
    weight = parameter_of(base_layer)
    if type(weight) is not nn.Parameter or weight.requires_grad:
        return False
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    hooked = any(getattr(base_layer, f"_{kind}_hooks") for kind in kinds)
    return not hooked and not _has_any_global_hook()


def stored_weight(base_layer: nn.Module) -> Tensor:
    """The tensor that stores a layer's weight. Some quantised layers have packed tensors instead of a `weight`."""
    named = (getattr(base_layer, name, None) for name in ("weight", "qweight", "W_q"))
    found = next((tensor for tensor in named if isinstance(tensor, Tensor)), None)
    return next(chain(base_layer.parameters(), base_layer.buffers())) if found is None else found


def values_dtype_of(base_layer: Any) -> torch.dtype:
    """The dtype that PEFT gives to new adapter weights: the base's, or fp32 over packed and 8-bit weights."""
    dtype: torch.dtype = getattr(base_layer, "compute_dtype", None) or stored_weight(base_layer).dtype
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32
