"""Merging adapters into a base weight and taking them out again, every bit as before."""

from __future__ import annotations

import warnings
from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...hf.internals import QuantizationBackend, check_adapters_to_merge, onload_layer
from ..bases.experts import ExpertBank
from ..bases.neurons import neuron_view
from ..bases.offloaded import is_offloaded
from ..bases.quantised import dense_layer, float_weight, requantised_layer
from ..delta import SparseDelta
from ..support import Support
from .mergeable import check_mergeable


@dataclass
class Merged:
    """One merged adapter, the weights that it replaced, in the shape of its support, and the bias before it."""

    adapter_name: str
    support: Support
    originals: Tensor
    bias: Tensor | None = None


@dataclass
class SetAside:
    """What is no longer in its place while adapters are merged: a quantised base layer, or a quantised parameter of
    experts, with its backend, and the parameters that others use too, by name."""

    base_layer: nn.Module | None = None
    backend: QuantizationBackend | None = None
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


class MergingMixin:
    """
    `merge` and `unmerge` of a sparse layer.

    Attributes:
        copied_to_merge (`tuple[str, ...]`): which of the base layer's parameters (`"weight"`, `"bias"`) merging
            replaces by copies, since something else uses their memory: a module that is not adapted in the same way,
            or another process. Set by [`~peft_ext.sparse.model.merge_once.note_sharing`].
        follows (`bool`): whether another layer with the same weight and adapters merges for both.
        requantize (`bool`): whether a merged weight is quantised again.
        requantization_error (`float`, *optional*): relative error that this made.
        dense_dtype (`torch.dtype`, *optional*): of a weight merged into a dequantised copy.
    """

    base_layer: nn.Module
    deltas: MutableMapping[str, SparseDelta]
    merged: bool
    quantization_backend: QuantizationBackend | None
    base_matrix: Callable[[], Tensor]
    get_base_layer: Callable[[], Any]
    active_adapters: list[str]
    ready: Callable[[str], SparseDelta]

    def __init__(self) -> None:
        super().__init__()
        self.copied_to_merge: tuple[str, ...] = ()
        self.requantize = False
        self.requantization_error: float | None = None
        self.dense_dtype: torch.dtype | None = None
        self._set_aside: SetAside | None = None
        self.merge_alone()

    def merge_alone(self) -> None:
        """Keep a record of merges of its own."""
        self.follows = False
        self.merged_adapters: list[str] = []
        self._merged: list[Merged] = []

    def merge_with(self, leader: MergingMixin) -> None:
        """Share the record of a layer with the same weight and adapters: whichever merges, merges for both."""
        self.follows = True
        self.merged_adapters = leader.merged_adapters
        self._merged = leader._merged

    def get_base_weight(self) -> Tensor:
        """The base weight, or a dequantised copy."""
        return float_weight(self.get_base_layer(), self.quantization_backend)

    @property
    def is_dequantised(self) -> bool:
        """Whether a dense layer stands in the place of a quantised one."""
        aside = self._set_aside
        return aside is not None and aside.backend is not None and self.requantization_error is None

    @property
    def original_backend(self) -> QuantizationBackend | None:
        """That of the base layer without what is merged into it."""
        aside = self._set_aside
        return self.quantization_backend if aside is None or aside.backend is None else aside.backend

    @torch.no_grad()
    def original_matrix(self) -> Tensor:
        """The base weight as `[rows, fan_in]` without what is merged into it: a view of it, or a copy."""
        aside = self._set_aside or SetAside()
        if aside.base_layer is not None:
            return neuron_view(aside.base_layer, float_weight(aside.base_layer, aside.backend))
        if "weight" in aside.parameters and aside.backend is None:
            return neuron_view(self.get_base_layer(), aside.parameters["weight"].detach())
        if not self._merged:
            return self.base_matrix()
        matrix = self.base_matrix().clone()
        for merged in reversed(self._merged):
            merged.support.to(matrix.device).scatter_(matrix, merged.originals.to(matrix))
        return matrix

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Add adapters to the base weight at their entries and keep the weights they replace, so that `unmerge` restores
        every bit. A quantised base layer gives way to a dense `nn.Linear` with its dequantised weight, a quantised
        parameter of experts to a dense one.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`):
                Check for NaN and infinity before anything is written.
            adapter_names (`list[str]`, *optional*):
                Which adapters; by default the active ones.

        Raises:
            `ValueError`: with `safe_merge`, if a merged weight would not be finite; or if the base weight is sharded,
                stored in 8 bits or computed by a parametrization.
            `TypeError`: if the base weight is quantised by a method that can't give it back, or is one of experts that
                should be quantised again.
        """
        if self.follows and self.merged:
            wanted = self.active_adapters if adapter_names is None else adapter_names
            if set(wanted) <= set(self.merged_adapters):
                return
        with self._base_in_place():
            self._merge(safe_merge, adapter_names)

    def _merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.deltas]
        if not names:
            return
        backend, experts_again = self.quantization_backend, self.requantize and self.original_backend is not None
        check_mergeable(self.get_base_layer(), backend, experts_again, bool(self.copied_to_merge))
        for name in names:
            self.ready(name)
        if self.requantization_error is not None:  # start again from the original, not from the rounded weight
            names = [*self.merged_adapters, *names]
            self.restore(0)
        done = len(self._merged)
        if not done:
            self._take_copy()
        for name in names:
            delta = self.deltas[name]
            matrix = self.base_matrix()
            support = delta.support.to(matrix.device)
            originals = support.gather(matrix)
            merged = (originals + delta.values.to(matrix.device)).to(matrix.dtype)
            added = delta.added_bias
            bias = None if added is None else self.get_base_layer().bias + added.to(matrix.device)
            if safe_merge and not all(bool(torch.isfinite(new).all()) for new in (merged, bias) if new is not None):
                self.restore(done)
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self._write(support, merged)
            self._merged.append(Merged(name, support, originals, self._write_bias(bias)))
            self.merged_adapters.append(name)
        aside = self._set_aside or SetAside()
        if self.requantize and aside.base_layer is not None and aside.backend is not None:
            merged = self.get_base_layer().weight.detach()
            layer, self.requantization_error = requantised_layer(aside.base_layer, aside.backend, merged)
            self._replace_base(layer, aside.backend)

    @torch.no_grad()
    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """Take adapters, by default all, out of the base weight in any order: every bit as before they were merged."""
        if not self.merged:
            if not self.follows:
                warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        kept = [] if adapter_names is None else [name for name in self.merged_adapters if name not in adapter_names]
        with self._base_in_place():
            self.restore(0)
        if kept:
            self.merge(adapter_names=kept)

    def _base_in_place(self) -> AbstractContextManager[None]:
        """Has the weights of an offloaded base layer in place, and puts what they became back where they came from."""
        base_layer = self.get_base_layer()
        return onload_layer(self) if is_offloaded(base_layer) and base_layer.weight.is_meta else nullcontext()

    def _take_copy(self) -> None:
        """Before the first merge: put something in the place of what must not be changed."""
        base_layer, backend = self.get_base_layer(), self.quantization_backend
        copied = {name for name in self.copied_to_merge if backend is None or name != "weight"}
        if backend is None and not copied:
            return
        is_bank = isinstance(base_layer, ExpertBank)
        self._set_aside = SetAside(None if backend is None or is_bank else base_layer, backend)
        if backend is not None and is_bank:
            copied.add("weight")
        for name in copied:
            holder, key = _holder(base_layer, name)
            original = self._set_aside.parameters[name] = getattr(holder, key)
            if backend is not None and name == "weight":
                copy = self.get_base_weight()
                copy = copy.to(self.dense_dtype or copy.dtype)
            else:
                copy = original.detach().clone()
            setattr(holder, key, nn.Parameter(copy, original.requires_grad))
        if is_bank:
            self.quantization_backend = None
        elif backend is not None:
            weight = self.get_base_weight()
            self._replace_base(dense_layer(base_layer, weight, self.dense_dtype or weight.dtype), None)

    def _replace_base(self, base_layer: nn.Module, backend: QuantizationBackend | None) -> None:
        holder: Any = self
        while hasattr(holder.base_layer, "base_layer"):  # another tuner's layer
            holder = holder.base_layer
        holder.base_layer = base_layer
        self.quantization_backend = backend

    def restore(self, length: int) -> None:
        """Undo merges, last first, until `length` remain."""
        aside = (self._set_aside if length == 0 else None) or SetAside()
        weight_is_written = aside.base_layer is None and "weight" not in aside.parameters
        bias = None
        while len(self._merged) > length:
            merged = self._merged.pop()
            self.merged_adapters.pop()
            if weight_is_written:
                self._write(merged.support, merged.originals)
            self._write_bias(merged.bias)
            bias = merged.bias if merged.bias is not None else bias
        if aside.base_layer is not None:
            self._replace_base(aside.base_layer, aside.backend)
            self._write_bias(bias)  # a dense layer in its place had the same bias, a requantised one a copy
        for name, parameter in aside.parameters.items():
            setattr(*_holder(self.get_base_layer(), name), parameter)
        if aside.backend is not None:
            self.quantization_backend = aside.backend
        if length == 0:
            self._set_aside = self.requantization_error = None

    def _write_bias(self, bias: Tensor | None) -> Tensor | None:
        """Overwrite the base layer's bias, if there is one to write; what it was."""
        if bias is None:
            return None
        before: Tensor = self.get_base_layer().bias.clone()
        self.get_base_layer().bias.copy_(bias)
        return before

    def _write(self, support: Support, values: Tensor) -> None:
        """Overwrite the base weight at a support."""
        weight = self.get_base_weight()
        matrix = neuron_view(self.get_base_layer(), weight)
        support.to(weight.device).scatter_(matrix, values.to(matrix))
        if matrix.data_ptr() != weight.data_ptr():  # another memory format: the matrix is a copy
            weight.copy_(matrix.view(weight.shape))


def _holder(base_layer: Any, name: str) -> tuple[nn.Module, str]:
    """The module that has a base layer's `"weight"` or `"bias"` among its parameters, and the name there."""
    if not isinstance(base_layer, ExpertBank):
        return base_layer, name
    return base_layer.owner, base_layer.name if name == "weight" else f"{base_layer.name}_bias"
