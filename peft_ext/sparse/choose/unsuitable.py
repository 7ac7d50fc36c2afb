"""Layers that an adapter does not suit: it would not be computed on them, or could not be merged."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from ...hf.internals import QuantizationBackend
from ..bases.experts import bank_names
from ..bases.neurons import SUPPORTED, base_of, has_writable_weight, is_supported, matrix_shape, weights_of
from ..bases.offloaded import is_offloaded
from .experts import why_not_adapted
from .weight_reads import layers_read


def unsuitable_layers(model: nn.Module) -> dict[str, str | None]:
    """
    The layers of a model, perhaps with adapters in it, that `"all-linear"`, `"all-neurons"` and the default leave out:
    by name, the class that reads the layer's weight, or `None` if a parametrization computes it.
    """
    found: dict[str, str | None] = {}
    for name, module in model.named_modules():
        base = base_of(module)
        if is_supported(base, None) and not all(map(has_writable_weight, weights_of(name, base).values())):
            found[name] = None
        for layer in _layers_read(module, base):
            if is_supported(base_of(module.get_submodule(layer)), None):
                found[f"{name}.{layer}".lstrip(".")] = type(base).__name__
    return found


def _layers_read(module: nn.Module, base: nn.Module) -> Iterable[str]:
    if isinstance(base, nn.MultiheadAttention):
        return [name for name, _ in module.named_children()]
    return layers_read(module) if module is base else ()  # an adapter reads the layer that it is on


def check_suitable(model: nn.Module, targets: Iterable[str], trained: bool = False) -> None:
    """
    Check the names of targets. Raises `ValueError` if an adapter does not suit one of them; of a `trained` adapter,
    which has them already, it warns.
    """
    unsuitable = unsuitable_layers(model)
    named = [name for name in sorted(targets) if name in unsuitable]
    if trained:
        named = [name for name in named if unsuitable[name] is not None]  # of others, merging says so
    if not named:
        return
    first = f"'{named[0]}'" + (f" ({len(named)} such layers in all)" if len(named) > 1 else "")
    reads = f"{unsuitable[named[0]]} computes with its weight without calling it, always or on some paths"
    if trained:
        warnings.warn(
            f"The adapter has values on {first}. {reads}. There the values are not computed, and merging them changes "
            "what the model gives. Train the adapter anew without these layers.",
            stacklevel=3,
        )
        return
    reason = f"{reads}, so an adapter on it would not be computed. Name other layers"
    if unsuitable[named[0]] is None:
        reason = (
            "A parametrization computes its weight, so nothing could be merged into it. Remove that first "
            "(torch.nn.utils.parametrize.remove_parametrizations)"
        )
    ends = ", ".join(sorted({repr(name.rpartition(".")[2]) for name in named}))
    raise ValueError(f"target_modules has {first}. {reason}, or add {ends} to `exclude_modules`.")


def check_supported(name: str, module: nn.Module, backend: QuantizationBackend | None, own: tuple[type, ...]) -> None:
    """
    Check the type of a target, perhaps a tuner's layer around the one to adapt; the classes `own` hold this method's
    adapters. Raises `TypeError` if it has no neurons, or its weights can't be reached.
    """
    base = base_of(module)
    advice = f"Narrow `target_modules`, or add '{name}' to `exclude_modules`."
    if not is_supported(base, backend):
        fused = [key for key, parameter in base.named_parameters(recurse=False) if parameter.dim() == 3]
        size = " with an empty weight" if isinstance(base, nn.Linear) and 0 in matrix_shape(base) else ""
        hint = f" Its '{fused[0]}' fuses the weights of several layers into one." if fused else ""
        reason = why_not_adapted(base)
        if reason is not None:
            hint = f" {reason[0].upper()}{reason[1:]}."
        if isinstance(base, nn.Embedding):
            hint = " To train the embeddings of some tokens, name these in `trainable_token_indices`."
        raise TypeError(
            f"Target module '{name}' is a {type(base).__name__}{size}, which is not supported.{hint} Supported "
            f"are {SUPPORTED}. {advice}"
        )
    is_attention = isinstance(base, nn.MultiheadAttention)
    if not is_attention and not bank_names(base):
        return
    if module is not base and not isinstance(module, own):
        kind = "an attention" if is_attention else "a module of fused experts"
        raise TypeError(f"Target module '{name}' is {kind} that another method has adapted. {advice}")
    if is_offloaded(base):
        kind = "nn.MultiheadAttention" if is_attention else type(base).__name__
        raise TypeError(
            f"Target module '{name}' is an offloaded {kind}. Its weights are there only while the module itself "
            f"runs, which an adapted one does not. Keep it on a device. {advice}"
        )
