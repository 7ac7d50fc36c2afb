"""Merging adapters into a base weight and taking them out again, every bit as before."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._peft_internals import QuantizationBackend, check_adapters_to_merge
from ..delta import SparseDelta
from ..neurons import neuron_view
from ..support import Support


@dataclass
class Merged:
    """One merged adapter, the weights that it replaced, in the shape of its support, and the bias before it."""

    adapter_name: str
    support: Support
    originals: Tensor
    bias: Tensor | None = None


class MergingMixin:
    """`merge` and `unmerge` of a sparse layer."""

    deltas: Any
    merged: bool
    quantization_backend: QuantizationBackend | None
    base_matrix: Callable[[], Tensor]
    get_base_layer: Callable[[], Any]
    get_base_weight: Callable[[], Tensor]
    _ready: Callable[[str], SparseDelta]

    def __init__(self) -> None:
        super().__init__()
        self.merged_adapters: list[str] = []
        self._merged: list[Merged] = []

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Add adapters to the base weight at their entries and keep the weights they replace, so that `unmerge` restores
        every bit.

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
        done = len(self._merged)
        for name in names:
            delta = self._ready(name)
            matrix = self.base_matrix()
            support = delta.support.to(matrix.device)
            originals = support.gather(matrix)
            merged = (originals + delta.weight.to(matrix.device)).to(matrix.dtype)
            bias = None if delta.bias is None else self.get_base_layer().bias + delta.bias.to(matrix.device)
            if safe_merge and not all(bool(torch.isfinite(new).all()) for new in (merged, bias) if new is not None):
                self._restore(done)
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self._write(support, merged)
            self._merged.append(Merged(name, support, originals, self._write_bias(bias)))
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
        while len(self._merged) > length:
            merged = self._merged.pop()
            self.merged_adapters.pop()
            self._write(merged.support, merged.originals)
            self._write_bias(merged.bias)

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
