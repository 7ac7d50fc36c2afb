"""A base layer with sparse adapters: which path computes it, how adapters merge and unmerge."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._peft_internals import (
    BaseTunerLayer,
    QuantizationBackend,
    check_adapters_to_merge,
    in_out_features,
    quantization_extra_repr,
)
from .config import SparseConfig
from .delta import SparseDelta
from .neurons import is_plain, neuron_view, values_dtype_of
from .ops import choose_backend, dense, folded
from .ops.reference import dense_delta, sparse_linear
from .support import Support


BASE_ADAPTER = "__base__"  # PEFT's name for "no adapter" in a mixed batch


@dataclass
class Merged:
    """One merged adapter, the weights that it replaced, in the shape of its support, and the whole bias before it."""

    adapter_name: str
    support: Support
    originals: Tensor
    bias: Tensor | None = None


class SparseLinear(nn.Module, BaseTunerLayer):
    """
    A linear layer (`nn.Linear`, transformers' `Conv1D`, or quantised) with sparse adapters.

    Subclasses name the container of the adapters after their method's prefix in `adapter_layer_names`.

    Args:
        base_layer (`nn.Module`):
            The layer to adapt, or another tuner's layer around it.
        quantization_backend (`QuantizationBackend`, *optional*):
            PEFT's access to a quantised weight.
    """

    # Of PEFT's mixin, which has no types.
    get_base_layer: Callable[[], Any]
    get_base_weight: Callable[[], Tensor]
    set_adapter: Callable[..., None]
    merged: bool
    disable_adapters: bool
    active_adapters: list[str]

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ("backends",)

    def __init__(self, base_layer: nn.Module, quantization_backend: QuantizationBackend | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend
        self.merged_adapters: list[str] = []
        self._merged: list[Merged] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.backends: dict[str, str] = {}
        self.in_features, self.out_features = in_out_features(self.get_base_layer())
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())

    @property
    def deltas(self) -> Any:
        """The adapters on this layer: an `nn.ModuleDict` of [`SparseDelta`]."""
        return getattr(self, self.adapter_layer_names[0])

    def base_matrix(self) -> Tensor:
        """The base weight as `[rows, fan_in]`: a view of it, or a dequantised copy."""
        return neuron_view(self.get_base_layer(), self.get_base_weight())

    def update_layer(
        self, adapter_name: str, config: SparseConfig, support: Support, pending: bool = False, **kwargs: Any
    ) -> None:
        """
        Add an adapter.

        Args:
            adapter_name (`str`): its name.
            config ([`SparseConfig`]): its options.
            support ([`Support`]): its entries, or a placeholder of the right shape.
            pending (`bool`): whether `support` is a placeholder.
        """
        base_layer = self.get_base_layer()
        dtype = getattr(torch, config.values_dtype) if config.values_dtype else values_dtype_of(base_layer)
        with_bias = config.train_bias and getattr(base_layer, "bias", None) is not None
        delta = SparseDelta(support, dtype, pending, with_bias)
        if not config.init_weights and not delta.weight.is_meta:
            for parameter in delta.parameters():
                nn.init.normal_(parameter)
        if not pending and not support.indices.is_meta:
            delta.fingerprint.copy_(support.fingerprint(self.base_matrix()))
        self.deltas[adapter_name] = delta
        self.backends[adapter_name] = config.backend
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Called by PEFT after loading. PEFT's own version also casts to the base's dtype, which would round fp32
        values loaded onto a bf16 base with `low_cpu_mem_usage=True`."""
        if adapter_name in self.deltas and not self.deltas[adapter_name].weight.is_meta:
            self.deltas[adapter_name].to(device or self.get_base_layer().weight.device)

    # ------------------------------------------------------------------ forward

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output plus the active adapters' updates, in the base layer's output dtype."""
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
        result = self._first(active[0], x, *args, **kwargs)
        for name in active[1:]:
            result = self._ready(name)(result, x)
        return self._with_biases(result, active)

    def _with_biases(self, result: Tensor, adapter_names: list[str]) -> Tensor:
        """A layer's output `[..., rows]` plus what adapters add to its bias."""
        for name in adapter_names:
            bias = self.deltas[name].bias
            if bias is not None:
                result = result + bias.to(result.dtype)
        return result

    def _first(self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base layer and one adapter together, by the path that suits them."""
        delta = self._ready(adapter_name)
        support = delta.support
        base_layer: Any = self.base_layer
        weight = neuron_view(base_layer, base_layer.weight) if is_plain(base_layer) else None
        path = choose_backend(
            self.backends[adapter_name], x, weight, support.entries, self.out_features, support.is_table
        )
        if weight is None or path == "bypass":
            return delta(self._base_result(x, *args, **kwargs), x)
        bias = base_layer.bias
        if path == "folded":
            return folded(x, weight, bias, delta.weight, delta.indices)
        if path == "dense":
            return dense(x, weight, bias, delta.weight, delta.indices, delta.offsets)
        return sparse_linear(x, weight, bias, delta.weight, delta.indices, delta.offsets)

    def _base_result(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
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
            result[chosen] = self._with_biases(self._ready(name)(result[chosen], x[chosen]), [name])
        return result

    def _ready(self, adapter_name: str) -> SparseDelta:
        """The adapter, after making sure that its entries are known and belong to this base weight."""
        delta: SparseDelta = self.deltas[adapter_name]
        if delta.pending:
            raise RuntimeError(
                f"The entries of adapter '{adapter_name}' are not known yet: it was created empty, to be loaded "
                "from a checkpoint. Load the checkpoint, or create the adapter without `low_cpu_mem_usage`."
            )
        if not torch.compiler.is_compiling():  # asked first: a compiled model must not depend on the flags
            if delta.stale:
                delta.refresh()
            if not delta.checked:
                self.check_base(adapter_name)
        return delta

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
                f"{self.out_features} layer's base weight has {reason}. Load it onto the base model it was trained on."
            )
        delta.checked = True

    def base_mismatch(self, support: Support, fingerprint: Tensor) -> str | None:
        """What differs between the base weight and a stored fingerprint; `None` if nothing, or if it can't be told."""
        backend = self.quantization_backend
        if self.merged or self.get_base_layer().weight.is_meta or (backend is not None and not backend.supports_merge):
            return None
        matrix = self.base_matrix()
        return support.to(matrix.device).mismatch(fingerprint, matrix, quantised=backend is not None)

    # ------------------------------------------------------------------ merging

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The adapter's update as a dense tensor in the shape of the base weight and the dtype of the values."""
        delta = self._ready(adapter_name)
        matrix = dense_delta(delta.weight.detach(), delta.indices, delta.fan_in, delta.offsets)
        return neuron_view(self.get_base_layer(), matrix)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Add adapters to the base weight at their entries and keep the weights they replace, so that
        [`~SparseLinear.unmerge`] restores every bit.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`):
                Check for NaN and infinity before anything is written.
            adapter_names (`list[str]`, *optional*):
                Which adapters; by default the active ones.

        Raises:
            `ValueError`: with `safe_merge`, if a merged weight would not be finite.
            `NotImplementedError`: if the base weight is quantised.
            `ValueError`: if the base weight is computed by a parametrization.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.deltas]
        if not names:
            return
        if "weight" not in self.get_base_layer()._parameters:
            raise ValueError(
                "The base layer's weight is computed by a parametrization, so nothing can be written into it. Remove "
                "the parametrization (torch.nn.utils.parametrize.remove_parametrizations) before merging."
            )
        if self.quantization_backend is not None:
            raise NotImplementedError(
                f"Merging into {self.quantization_backend.backend_name} weights is not supported yet; load the base "
                "model unquantised to merge."
            )
        matrix = self.base_matrix()
        base_bias: Any = getattr(self.get_base_layer(), "bias", None)
        done = len(self._merged)
        for name in names:
            delta = self._ready(name)
            support = delta.support.to(matrix.device)
            originals = support.gather(matrix)
            merged = (originals + delta.weight.to(matrix.device)).to(matrix.dtype)
            bias = None if delta.bias is None else (base_bias + delta.bias.to(base_bias.device)).to(base_bias.dtype)
            if safe_merge and not all(bool(torch.isfinite(new).all()) for new in (merged, bias) if new is not None):
                self._restore(done)
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            support.scatter_(matrix, merged)
            self._merged.append(Merged(name, support, originals, None if bias is None else base_bias.clone()))
            if bias is not None:
                base_bias.copy_(bias)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """
        Take adapters out of the base weight: every bit as before they were merged.

        Args:
            adapter_names (`list[str]`, *optional*): which ones, in any order; by default all.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        kept = [] if adapter_names is None else [name for name in self.merged_adapters if name not in adapter_names]
        self._restore(0)
        if kept:
            self.merge(adapter_names=kept)

    def _restore(self, length: int) -> None:
        """Undo merges, last first, until `length` remain."""
        matrix = self.base_matrix()
        while len(self._merged) > length:
            merged = self._merged.pop()
            self.merged_adapters.pop()
            merged.support.to(matrix.device).scatter_(matrix, merged.originals.to(matrix))
            if merged.bias is not None:
                self.get_base_layer().bias.copy_(merged.bias)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        # LoRA's product has no place for a bias.
        return adapter_name not in self.deltas or self.deltas[adapter_name].bias is None

    def __repr__(self) -> str:
        return f"{self.adapter_layer_names[0].partition('_')[0]}.{super().__repr__()}"

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
