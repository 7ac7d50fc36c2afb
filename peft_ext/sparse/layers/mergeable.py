"""Whether a base weight can be merged into."""

from __future__ import annotations

from typing import Any

from ...hf.internals import QuantizationBackend
from ..bases.experts import ExpertBank
from ..bases.neurons import has_writable_weight, parameter_of
from ..bases.projection import Projection
from ..bases.sharded import is_sharded


def check_mergeable(
    base_layer: Any, backend: QuantizationBackend | None, quantise_again: bool, is_copied: bool
) -> None:
    """
    Raises `ValueError` if a weight is sharded, stored in 8 bits or computed by a parametrization, or is a projection
    that something else uses (`is_copied`). Raises `TypeError` if it is quantised by a method that can't give it back,
    or is one of experts that should be quantised again.
    """
    if backend is not None and not backend.supports_merge:
        raise TypeError(
            f"{backend.backend_name} can't give its weights back, so nothing can be merged into them. Keep the "
            "adapter unmerged, or load it onto the unquantised base model and merge there."
        )
    if quantise_again and isinstance(base_layer, ExpertBank):
        raise TypeError(
            f"requantize=True: '{base_layer.name}' holds the weights of fused experts, which can't be quantised "
            "again. Merge without `requantize`; merged experts are dense."
        )
    if backend is None and is_sharded(parameter_of(base_layer)):
        raise ValueError(
            "The base weight is sharded over several processes, so nothing can be merged into it. Save the "
            "adapter, load it onto the base model in one process, and merge there."
        )
    if backend is None and parameter_of(base_layer).element_size() == 1:
        raise ValueError(
            f"The base weight is stored as {parameter_of(base_layer).dtype}, too coarse to hold an update. Load "
            "the adapter onto the model before its layers are cast, merge there, and cast afterwards."
        )
    if not has_writable_weight(base_layer):
        raise ValueError(
            "The base layer's weight is computed by a parametrization, so nothing can be written into it. Remove "
            "the parametrization (torch.nn.utils.parametrize.remove_parametrizations) before merging."
        )
    if is_copied and isinstance(base_layer, Projection):
        raise ValueError(
            "The nn.MultiheadAttention shares its weights with another module or process, so merging would change "
            "both. Give each of them parameters of its own before adapting."
        )
