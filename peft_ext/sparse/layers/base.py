"""A base layer with sparse adapters on its weight: what all layer types share."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ...hf.internals import BaseTunerLayer, QuantizationBackend, in_out_features, quantization_extra_repr
from ..another_base import REMEDY
from ..bases.neurons import (
    experts_of,
    is_plain,
    neuron_view,
    stored_weight,
    taps_of,
    values_dtype_of,
    weight_view,
)
from ..bases.offloaded import execution_device, is_offloaded
from ..bases.padding import CONVOLUTIONS
from ..bases.part import Part
from ..bases.quantised import is_readable
from ..config import SparseConfig
from ..delta import SparseDelta
from ..ops.reference import dense_delta
from ..support import Support
from .base_attributes import BaseAttributes
from .merging import MergingMixin
from .scaling import ScalingMixin


BASE_ADAPTER = "__base__"  # PEFT's name for "no adapter" in a mixed batch


class SparseLayer(BaseAttributes, MergingMixin, ScalingMixin, nn.Module, BaseTunerLayer):
    """
    A layer with one weight and sparse adapters on it.

    Subclasses compute the base layer and one adapter together in `_with_base`. Each method has subclasses of its own
    (see `types.py`), which name the container of the adapters after the method in `adapter_layer_names`.

    Args:
        base_layer (`nn.Module`):
            The layer to adapt, or another tuner's layer around it.
        quantization_backend (`QuantizationBackend`, *optional*):
            PEFT's access to a quantised weight.

    Attributes:
        called (`bool`): whether the layer has ever been called, but by compiled code.
    """

    # Of PEFT's mixin, which has no types.
    get_base_layer: Callable[[], Any]
    set_adapter: Callable[..., None]
    merged: bool
    disable_adapters: bool
    active_adapters: list[str]

    cast_input_dtype_enabled = False  # PEFT switches this off where diffusers casts layer by layer; inputs stay as is
    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ("backends",)

    def __init__(self, base_layer: nn.Module, quantization_backend: QuantizationBackend | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.backends: dict[str, str] = {}
        self.called = False
        base: Any = self.get_base_layer()
        if isinstance(base, Part):  # PEFT warns of types that it does not know
            self.in_features, self.out_features = base.in_features, base.out_features
        else:
            self.in_features, self.out_features = in_out_features(base)
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())

    @property
    def deltas(self) -> MutableMapping[str, SparseDelta]:  # type: ignore[override]
        """The adapters on this layer: an `nn.ModuleDict` of [`SparseDelta`]."""
        return getattr(self, self.adapter_layer_names[0])

    def base_matrix(self) -> Tensor:
        """The base weight as `[rows, fan_in]`: a view of it, or a copy (dequantised, or of another memory format)."""
        return neuron_view(self.get_base_layer(), self.get_base_weight())

    def update_layer(
        self,
        adapter_name: str,
        config: SparseConfig,
        support: Support,
        pending: bool = False,
        delta: SparseDelta | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Add an adapter with its entries, or with `pending` a placeholder of their shape. `delta`: the values of another
        layer with the same weight, to be shared.
        """
        self.deltas[adapter_name] = delta or self._new_delta(config, support, pending)
        self.backends[adapter_name] = config.backend
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _new_delta(self, config: SparseConfig, support: Support, pending: bool) -> SparseDelta:
        base_layer = self.get_base_layer()
        dtype = getattr(torch, config.values_dtype) if config.values_dtype else values_dtype_of(base_layer)
        delta = SparseDelta(support, dtype, pending, taps_of(base_layer), experts_of(base_layer))
        if config.train_bias and getattr(base_layer, "bias", None) is not None:
            delta.add_bias()
        if not config.init_weights and not delta.weight.is_meta:
            for parameter in delta.parameters():
                nn.init.normal_(parameter)
        readable = is_readable(base_layer, self.quantization_backend)
        if readable and not pending and not support.indices.is_meta:
            quantised = self.original_backend is not None
            delta.fingerprint.copy_(support.fingerprint(self.original_matrix(), quantised))
        return delta

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Called by PEFT after loading. PEFT's own version also casts to the base's dtype, which would round fp32
        values loaded onto a bf16 base with `low_cpu_mem_usage=True`."""
        base_layer = self.get_base_layer()
        if device is None:
            offloaded = is_offloaded(base_layer)
            device = execution_device(base_layer) if offloaded else stored_weight(base_layer).device
        if adapter_name in self.deltas and not self.deltas[adapter_name].weight.is_meta:
            self.deltas[adapter_name].to(device)

    # ------------------------------------------------------------------ forward

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output plus the active adapters' updates, in the base layer's output dtype."""
        if not torch.compiler.is_compiling() and not self.called:  # a compiled model must not depend on the flag
            self.called = True
        if self.disable_adapters:
            if adapter_names is not None:
                raise ValueError("adapter_names was passed, but adapters are disabled; enable them first.")
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        active = [name for name in self.active_adapters if name in self.deltas]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        for name in active:
            self._refuse_forward_mode(name, x)
        result = self._with_base(active[0], x, *args, **kwargs)
        for name in active[1:]:
            result = self._add(name, result, x)
        return result

    def _refuse_forward_mode(self, adapter_name: str, x: Tensor) -> None:
        """The operators have no forward-mode derivative, and torch would take it for zero."""
        if torch.compiler.is_compiling() or forward_ad._current_level < 0:
            return
        tensors = (x, *self.deltas[adapter_name].parameters())
        if self.backends[adapter_name] != "reference" and any(
            forward_ad.unpack_dual(t).tangent is not None for t in tensors
        ):
            raise NotImplementedError(
                "Sparse updates have no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad); use "
                "backward, or an adapter with backend='reference'."
            )

    def _bias_with(self, delta: SparseDelta) -> Tensor | None:
        """The base layer's bias plus what an adapter adds to it."""
        bias: Tensor | None = self.get_base_layer().bias
        added = delta.added_bias
        return bias if bias is None or added is None else bias + added.to(bias.dtype)

    def _with_base(self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base layer and one adapter together, by the path that suits them."""
        raise NotImplementedError

    def _add(self, adapter_name: str, result: Tensor, x: Tensor) -> Tensor:
        """`result + S x` by the bypass, and what the adapter adds to the bias."""
        return self.ready(adapter_name, x)(result, x)

    def _plain_weight(self, delta: SparseDelta) -> Tensor | None:
        """The base weight, if the base layer is a product with it and nothing else, and the adapter's values are at
        hand: those of one that FSDP has wrapped are whole only while it runs."""
        base_layer: Any = self.base_layer
        return base_layer.weight if type(delta) is SparseDelta and is_plain(base_layer) else None

    def _base_result(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if not isinstance(result, Tensor):  # a router of experts, which is a linear layer and more
            raise TypeError(
                f"The adapted {type(self.get_base_layer()).__name__} gives a {type(result).__name__}, not one tensor, "
                "so nothing can be added to what it computes. Leave such layers out with `exclude_modules`."
            )
        backend = self.quantization_backend
        return result if backend is None else backend.maybe_clone_base_result(result)

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Each sample with its own adapter, at inference: `adapter_names[i]` for sample i."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if x.dim() == 2 and len(x) % len(adapter_names) == 0:  # some models (OPT) flatten batch and tokens
            adapter_names = [name for name in adapter_names for _ in range(len(x) // len(adapter_names))]
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        result = self._base_result(x, *args, **kwargs).clone()
        for name in dict.fromkeys(adapter_names):
            if name == BASE_ADAPTER or name not in self.deltas:
                continue
            chosen = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
            result[chosen] = self._add(name, result[chosen], x[chosen])
        return result

    def ready(self, adapter_name: str, x: Tensor | None = None) -> SparseDelta:
        """The adapter, after making sure that its entries are known, belong to this base weight and are where `x` is,
        for who moves a module's parameters one by one, such as accelerate and FSDP, does not see them."""
        delta = self.deltas[adapter_name]
        if x is not None and x.device != delta.indices.device and not x.is_meta:
            delta.place(x.device)
        if delta.pending:
            raise RuntimeError(self.pending_reason(adapter_name))
        if not torch.compiler.is_compiling():  # asked first: a compiled model must not depend on the flags
            if delta.stale:
                delta.refresh()
            if not delta.checked:
                self.check_base(adapter_name)
        return delta

    def pending_reason(self, adapter_name: str) -> str:
        """Explain why an adapter has no entries yet, and what to do."""
        return (
            f"The entries of adapter '{adapter_name}' are not known yet: it was made to be loaded from a checkpoint "
            "(low_cpu_mem_usage=True, or a state_dict without its entries), or has been on the meta device. Load the "
            "checkpoint with `PeftModel.from_pretrained` or `load_adapter`, or add a new adapter to choose entries."
        )

    def check_base(self, adapter_name: str) -> None:
        """
        Compare the base weight with the one that the adapter was made for.

        Raises:
            `ValueError`: if it is another one.
        """
        delta = self.deltas[adapter_name]
        reason = self.base_mismatch(delta.support, delta.fingerprint)
        if reason is not None:
            raise ValueError(
                f"Adapter '{adapter_name}' was made for another base model: this {self.in_features}->"
                f"{self.out_features} layer's base weight has {reason}. Nothing was computed; {REMEDY}."
            )
        delta.checked = True

    def base_mismatch(self, support: Support, fingerprint: Tensor) -> str | None:
        """Difference between the base weight and a stored fingerprint; `None` if there is none or it is unknown."""
        backend = self.original_backend
        if not is_readable(self.get_base_layer(), backend):
            return None
        matrix = self.original_matrix()
        return support.to(matrix.device).mismatch(fingerprint, matrix, quantised=backend is not None)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The adapter's update as a dense tensor in the shape of the base weight and the dtype of the values."""
        delta = self.ready(adapter_name)
        matrix = dense_delta(delta.values.detach(), delta.indices, delta.fan_in, delta.offsets)
        return weight_view(self.get_base_layer(), matrix)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        # PEFT converts linear layers, under the names that the base model has for them; LoRA has no place for a bias.
        if isinstance(self.get_base_layer(), (*CONVOLUTIONS, Part)):
            return False
        return adapter_name not in self.deltas or self.deltas[adapter_name].bias is None

    def __repr__(self) -> str:
        return f"{self.adapter_layer_names[0].partition('_')[0]}.{super().__repr__()}"

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
