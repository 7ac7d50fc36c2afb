"""Quantised base layers: their weight as floats, and dense or requantised layers in their place."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...hf.internals import QuantizationBackend, get_quantization_kwargs, resolve_quantization_backend
from .fp8 import fp8_backend
from .neurons import stored_weight, weights_of
from .offloaded import is_offloaded, onloaded
from .part import Part
from .sharded import whole


def has_data(base_layer: Any) -> bool:
    """Whether a layer's weight is in memory, or can be brought there."""
    return not stored_weight(base_layer).is_meta or is_offloaded(base_layer)


def is_readable(base_layer: Any, backend: QuantizationBackend | None) -> bool:
    """Whether [`float_weight`] can give a layer's weight."""
    return has_data(base_layer) and (backend is None or backend.supports_merge)


def float_weight(base_layer: Any, backend: QuantizationBackend | None) -> Tensor:
    """A layer's weight as floats: its own memory, or a copy, dequantised, gathered from all processes or brought in
    from where it is offloaded."""
    with onloaded(base_layer):
        if backend is None:
            if isinstance(base_layer, Part):
                return base_layer.rows_of(whole(base_layer.parameter)).detach()
            return whole(base_layer.weight).detach()
        if getattr(getattr(base_layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            return _repacked_weight(base_layer.weight)
        return backend.get_base_weight(base_layer)


def _repacked_weight(weight: Any) -> Tensor:
    """
    A 4-bit weight that bitsandbytes has repacked, as it does at the first forward of inference on CPUs with
    AVX512-BF16. Its `dequantize_4bit` takes the packed bytes for unpacked ones, and its own way back leaves the scales
    transposed: wrong weights where a row has several blocks. Both are undone here, on copies. The scales stay rounded
    to bf16, as they are in the layer's products.
    """
    from bitsandbytes import functional

    state = copy.copy(weight.quant_state)
    dtype = state.original_dtype
    state.original_nested = False  # the packed scales are plain ones
    unpacked, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = state.absmax.t().reshape(-1).float()  # [blocks per row, rows] to [rows * blocks per row]
    return functional.dequantize_4bit(unpacked, state).to(dtype)


def dense_layer(base_layer: Any, weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    """A frozen `nn.Linear` with a weight, in the place of a quantised layer."""
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias=base_layer.bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
    if base_layer.bias is not None:
        bias = base_layer.bias
        layer.bias = bias if bias.dtype == dtype else nn.Parameter(bias.detach().to(dtype), bias.requires_grad)
    return layer.train(base_layer.training)


def requantised_layer(base_layer: Any, backend: QuantizationBackend, weight: Tensor) -> tuple[Any, float]:
    """
    A copy of a quantised layer with another weight, in its own format.

    Returns:
        The layer, and the error that quantising made: the Frobenius norm of the difference over that of `weight`.
    """
    holder = _Holder(copy.deepcopy(base_layer))
    backend.set_base_weight(holder, weight)
    layer = holder.base_layer
    difference = float_weight(layer, backend).float() - weight.float()
    return layer, float(difference.norm() / weight.float().norm().clamp(min=torch.finfo(torch.float32).tiny))


class _Holder:
    """Stand-in for a tuner's layer that PEFT's backends accept. Some of them replace its whole `base_layer`."""

    def __init__(self, base_layer: Any) -> None:
        self.base_layer = base_layer

    def get_base_layer(self) -> Any:
        return self.base_layer


def forget_quantisation(model: Any, dense_modules: list[str]) -> None:
    """
    Have a transformers model's config say that the named modules are dense now, so that it can be saved and loaded
    again. Models without a quantiser are left alone.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or not dense_modules:
        return
    weights = (base for module in model.modules() for base in weights_of("", module).values())
    if not any(backend_of(model, base) is not None for base in weights):
        quantizer.remove_quantization_config(model)
        for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            if hasattr(model, flag):
                setattr(model, flag, False)
        return
    config = model.config.quantization_config
    for field in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(config, field):
            # With the quantiser's own list: naming any module replaces its default, such as the output layer.
            kept = getattr(config, field) or getattr(quantizer, "modules_to_not_convert", None) or []
            setattr(config, field, sorted({*kept, *dense_modules}))
            return


def backend_of(model: nn.Module, base_layer: nn.Module) -> QuantizationBackend | None:
    """PEFT's access to a layer's quantised weight, or ours; `None` if it isn't quantised."""
    return resolve_quantization_backend(base_layer, **get_quantization_kwargs(model)) or fp8_backend(base_layer)
