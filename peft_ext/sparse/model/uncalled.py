"""Adapted layers that a model never called, although it called others beside them: what they hold is not computed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from weakref import WeakSet

from torch import nn

from ..bases.sharded import is_sharded
from ..delta import SparseDelta
from ..layers import SparseLayer


_NAMED: WeakSet[SparseLayer] = WeakSet()  # layers that a warning about training has named


def warn_of_untrained(model: nn.Module, layer_cls: type[SparseLayer], adapter_names: Iterable[str]) -> None:
    """Name, once, the layers of adapters in training that no forward pass of this process has called."""
    layers = {
        name: layer
        for name, layer in _uncalled(model, layer_cls, adapter_names)
        if layer not in _NAMED and any(p.requires_grad for delta in layer.deltas.values() for p in delta.parameters())
    }
    _NAMED.update(layers.values())
    if layers:
        warnings.warn(f"{_naming(layers)} The adapter learns nothing there. {_REMEDY}", stacklevel=3)


def warn_of_uncomputed(model: nn.Module, layer_cls: type[SparseLayer], adapter_names: Iterable[str]) -> None:
    """Name the layers with values to be merged that no forward pass of this process has called."""
    adapter_names = list(adapter_names)
    layers = {
        name: layer
        for name, layer in _uncalled(model, layer_cls, adapter_names)
        if not layer.merged and not all(map(_is_zero, _deltas(layer, adapter_names)))
    }
    if layers:
        warnings.warn(
            f"{_naming(layers)} The adapter's values there were not computed, but are merged, so the merged model may "
            f"give something else than the adapted one. {_REMEDY}",
            stacklevel=3,
        )


_REMEDY = "Leave such layers out with `exclude_modules`."


def _naming(layers: dict[str, SparseLayer]) -> str:
    first, *others = layers
    more = f" ({len(layers)} layers in all)" if others else ""
    return (
        f"'{first}'{more} was never called in this process, while layers beside it were: the model reads its weight "
        "without calling it, or does not use it."
    )


def _uncalled(
    model: nn.Module, layer_cls: type[SparseLayer], adapter_names: Iterable[str]
) -> Iterator[tuple[str, SparseLayer]]:
    """Layers with entries of the adapters that were not called, although others in a module around them were."""
    adapter_names = list(adapter_names)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, layer_cls) and any(delta.support.entries for delta in _deltas(layer, adapter_names))
    }
    compiled = _has_compiled()  # which leaves no mark on the layers, but training moves their values
    if not compiled and not any(layer.called for layer in layers.values()):
        return
    unmoved = {name: compiled and all(map(_is_zero, _deltas(layer, adapter_names))) for name, layer in layers.items()}
    for name, layer in layers.items():
        if not layer.called and any(
            layers[other].called or (unmoved[name] and not unmoved[other]) for other in _beside(model, layers, name)
        ):
            yield name.removeprefix("base_model.model."), layer


def _beside(model: nn.Module, layers: Iterable[str], name: str) -> Iterator[str]:
    """The other adapted layers in the modules around this one, up to an item of a list, which may be an expert."""
    owner = name
    while owner:
        owner, _, _ = owner.rpartition(".")
        if isinstance(model.get_submodule(owner), (nn.ModuleList, nn.ModuleDict)):
            return
        prefix = f"{owner}." if owner else ""
        yield from (layer for layer in layers if layer.startswith(prefix) and not f"{layer}.".startswith(f"{name}."))


def _deltas(layer: SparseLayer, adapter_names: Iterable[str]) -> list[SparseDelta]:
    return [layer.deltas[name] for name in adapter_names if name in layer.deltas]


def _is_zero(delta: SparseDelta) -> bool:
    """Whether an adapter changes nothing; not, where that can't be told from here."""
    tensors = [tensor for tensor in (delta.weight, delta.bias) if tensor is not None]
    return not any(tensor.is_meta or is_sharded(tensor) or bool(tensor.any()) for tensor in tensors)


def _has_compiled() -> bool:
    """Whether torch has compiled anything in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters["stats"].get("unique_graphs"))
