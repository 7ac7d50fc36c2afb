"""Fused experts: their module runs as its class computes it, and adapters add to its products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...hf.internals import QuantizationBackend
from ..bases.bank_product import run_with
from ..bases.experts import ExpertBank, bank_names
from .base import BASE_ADAPTER, SparseLayer
from .composite import SparseComposite


class SparseExpertBank(SparseLayer):
    """One layer of all experts of a module, with sparse adapters. It is computed by the [`SparseExperts`] around it,
    always by the bypass."""

    def add(self, adapter_names: Sequence[str], result: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        """
        What the experts computed of x `[tokens, fan_in]`, sorted by expert as `ends` says, plus the adapters' updates.
        """
        for name in adapter_names:
            self._refuse_forward_mode(name, x)
            result = self.ready(name, x)(result, x, ends=ends)
        return result


class SparseExperts(SparseComposite):
    """
    A module of fused experts with sparse adapters on its layers, which are of the class `bank`.

    The experts' own forward runs, also with transformers' other implementations of it, so what the base computes is
    the same in every bit. While no adapter is active, or while they are merged, the module itself is called.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        bank: type[SparseExpertBank],
        backend_of: Callable[[nn.Module], QuantizationBackend | None],
    ) -> None:
        banks = {name: ExpertBank(base_layer, name) for name in bank_names(base_layer)}
        super().__init__(base_layer, {name: bank(layer, backend_of(layer)) for name, layer in banks.items()})

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """As the experts' own forward, with the same arguments and results."""
        if not torch.compiler.is_compiling():  # a compiled model must not depend on the flags
            for layer in self.parts.values():
                layer.called = True
        if adapter_names is not None:
            return self._mixed_batch_forward(adapter_names, *args, **kwargs)
        if self._is_idle():
            return self.base_layer(*args, **kwargs)
        return self._run(self.active_adapters, *args, **kwargs)

    def _run(self, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """The experts with some of their adapters."""
        self._check_called_whole()
        added = {}
        for part_name, layer in self.parts.items():
            present = [name for name in adapter_names if name in layer.deltas]
            if present and not layer.merged:
                added[part_name] = layer.get_base_layer(), partial(layer.add, present)
        return run_with(self.base_layer, added, *args, **kwargs)

    def _mixed_batch_forward(self, adapter_names: list[str], *args: Any, **kwargs: Any) -> Any:
        """Each sample with its own adapter, at inference. What experts get is tokens of all samples, one after the
        other; Llama 4's get them once for each expert."""
        if self.disable_adapters:
            raise ValueError("adapter_names was passed, but adapters are disabled; enable them first.")
        if self.merged_adapters:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        copies = 1 if len(args) + len(kwargs) > 1 else self.base_layer.num_experts
        tokens = len(x) // copies
        if tokens % len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} names and {tokens} tokens."
            )
        result = self.base_layer(*args, **kwargs).clone()
        for name in dict.fromkeys(adapter_names):
            if name == BASE_ADAPTER or name not in self._get_available_adapters():
                continue
            samples = torch.tensor([other == name for other in adapter_names], device=x.device)
            rows = samples.repeat_interleave(tokens // len(adapter_names)).repeat(copies).nonzero()[:, 0]
            result[rows] = self._run(
                [name],
                *(_rows(value, rows) for value in args),
                **{k: _rows(value, rows) for k, value in kwargs.items()},
            )
        return result


def _rows(value: Any, rows: Tensor) -> Any:
    return value[rows] if isinstance(value, Tensor) else value
