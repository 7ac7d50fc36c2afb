"""Merging a whole model: weights that modules share, and quantised ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..bases.quantised import forget_quantisation
from ..layers import SparseLayer
from .merge_once import note_sharing
from .uncalled import warn_of_uncomputed


class MergeMixin:
    """`merge_adapter` and `merge_and_unload` of sparse tuners."""

    model: nn.Module
    tuner_layer_cls: type[SparseLayer]
    active_adapters: list[str]
    _kept_padded: list[nn.TransformerEncoder]

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, requantize: bool = False
    ) -> None:
        """
        Merge adapters into the base weights; [`~BaseTuner.unmerge_adapter`] restores every bit.

        Weights that modules share are merged once if all of these modules have the adapters; otherwise the adapted
        ones get a copy until they are unmerged. Quantised layers give way to dense ones with dequantised weights.

        Args:
            adapter_names (`list[str]`, *optional*): which adapters; by default the active ones.
            safe_merge (`bool`, *optional*, defaults to `False`): check for NaN and infinity before anything changes.
            requantize (`bool`, *optional*, defaults to `False`):
                Quantise merged weights again, as the base layer is. A warning states the error that this makes.
        """
        warn_of_uncomputed(self.model, self.tuner_layer_cls, adapter_names or self.active_adapters)
        with self._merging(requantize):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)  # type: ignore[misc]

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        requantize: bool = False,
    ) -> nn.Module:
        """
        Merge adapters and return the base model without any. Merged quantised layers are dense `nn.Linear` then, and
        the model's quantisation config says so, unless `requantize` is set; see [`~MergeMixin.merge_adapter`].
        """
        warn_of_uncomputed(self.model, self.tuner_layer_cls, adapter_names or self.active_adapters)
        with self._merging(requantize):
            return super().merge_and_unload(  # type: ignore[misc]
                progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        # With what is already merged, which stays merged, as in PEFT.
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, self.tuner_layer_cls)}
        unloaded = super()._unload_and_optionally_merge(merge=merge, **kwargs)  # type: ignore[misc]
        for encoder in self._kept_padded:
            encoder.use_nested_tensor = True
        forget_quantisation(unloaded, [name for name, layer in layers.items() if layer.is_dequantised])
        return unloaded

    def _check_merge_allowed(self) -> None:
        # PEFT's own check only warns of what is handled here: a merged layer gets a weight of its own where something
        # else uses the old one.
        note_sharing(self.model, self.tuner_layer_cls)

    @contextmanager
    def _merging(self, requantize: bool) -> Iterator[None]:
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, self.tuner_layer_cls)}
        for layer in layers.values():
            layer.requantize = requantize
        before = {name: list(layer.merged_adapters) for name, layer in layers.items()}
        try:
            yield
        except BaseException:  # of one layer, after others have merged
            for name, layer in layers.items():
                if layer.merged_adapters != before[name] and not layer.follows:
                    layer.restore(len(before[name]))
            raise
        finally:
            for layer in layers.values():
                layer.requantize = False
        errors = {name: layer.requantization_error for name, layer in layers.items()}
        known = {name: error for name, error in errors.items() if error is not None}
        if requantize and known:
            worst = max(known, key=lambda name: known[name])
            warnings.warn(
                f"Quantising {len(known)} merged weights again changed them by {sum(known.values()) / len(known):.2%} "
                f"of their norm on average, '{worst}' by {known[worst]:.2%}; the adapters' updates are rounded as "
                "well. Merge without `requantize` to keep them.",
                stacklevel=4,
            )
