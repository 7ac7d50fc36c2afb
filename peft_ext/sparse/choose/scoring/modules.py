"""Choice of the weights to score."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ....hf.internals import INCLUDE_LINEAR_LAYERS_SHORTHAND, check_target_module_exists
from ...bases.neurons import base_model_of, base_of, is_supported, weights_of
from ...bases.part import Part
from ...bases.quantised import backend_of
from ...config import SparseConfig
from ...selection.given import uncompiled
from ..experts import wanted_banks
from ..heads import HEADS, heads_of
from ..targets import ALL_NEURONS, inside_adapter, without_parts
from ..unsuitable import check_suitable, unsuitable_layers


def scored_modules(model: nn.Module, config: SparseConfig | None) -> dict[str, Any]:
    """
    The base layers to score, under the names that an adapter's targets have: those of a config's `target_modules`, or
    every layer that has neurons, without the head. The model may have adapters in it.

    Raises `TypeError` if a layer's weight is quantised, so that there is no gradient for it, and `ValueError` if no
    layer is left, or the config names one that an adapter does not suit.
    """
    model = base_model_of(model)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    shorthands = (None, INCLUDE_LINEAR_LAYERS_SHORTHAND, ALL_NEURONS)
    named = config is not None and config.target_modules not in shorthands
    heads = {*HEADS, *heads_of(model)}
    banks = wanted_banks(model, config) if config is not None and named else {}
    targets: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        base, name = base_of(module), uncompiled(path)
        if not is_supported(base, None) or inside_adapter(model, path):
            continue
        if named and path in banks:
            wanted: Any = banks[path]
        else:
            in_head = base is output or name.partition(".")[0] in heads
            wanted = check_target_module_exists(config, name) if named else not in_head
        if wanted:
            targets[path] = base
    if named:
        targets = without_parts(model, targets)
        check_suitable(model, targets)
    unsuitable = unsuitable_layers(model)
    found: dict[str, Any] = {}
    for path, base in targets.items():
        if path not in unsuitable:
            layers = weights_of(uncompiled(path), base)
            kept = [f"{uncompiled(path)}.{bank}" for bank in banks[path]] if path in banks else layers
            found.update({key: layers[key] for key in kept})
    if not found:
        raise ValueError(
            "The model has no layers to score"
            + (f" that target_modules={config.target_modules!r} matches" if config is not None and named else "")
            + "; name layers with neurons in the config's `target_modules`."
        )
    for name, base in found.items():
        if base.weight.is_complex():
            raise TypeError(f"The weight of '{name}' is complex, so it can't be scored; add it to `exclude_modules`.")
        packed = not base.weight.is_floating_point() or base.weight.element_size() == 1
        if packed or backend_of(model, base) is not None:
            raise TypeError(
                f"The weight of '{name}' is quantised ({type(base.weight).__name__}, {base.weight.dtype}), so it "
                "can't be scored. Score the unquantised model; the scores then serve the quantised one too."
            )
    return found


def rows_of(layer: Any, tensor: Tensor) -> Tensor:
    """A layer's part of a tensor in the shape of its parameter: a view."""
    return layer.rows_of(tensor) if isinstance(layer, Part) else tensor
