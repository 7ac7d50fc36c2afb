"""Replace an adapter by another in place, without a new layer and so without recompilation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...hf.adapter_state import naming
from ...hf.internals import load_peft_weights, mapping
from .sparse_model import SparseModel


@torch.no_grad()
def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str,
    adapter_name: str = "default",
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """
    Load an adapter over a loaded one that has the same options. A model compiled with `torch.compile` is not compiled
    again, because every tensor keeps its place and shape.

    Args:
        model (`torch.nn.Module`):
            A `PeftModel`, or a model with sparse adapters injected; compiled or not.
        model_name_or_path (`str`):
            Folder or Hub id of the new adapter.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            Name of the loaded adapter to replace.
        torch_device (`str`, *optional*):
            Device to read the file to; by default the CPU.
        **kwargs:
            Passed on to the download from the Hub.

    Raises:
        `ValueError`: If the adapter is not a sparse one, the new one has other options, or its file is damaged. The
            loaded adapter is then unchanged.

    Example:

        ```py
        >>> from peft_ext import hotswap_adapter

        >>> hotswap_adapter(model, "user/another-adapter")
        ```
    """
    model = getattr(model, "_orig_mod", model)
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"adapter_name={adapter_name!r} is not loaded; choose from {list(configs)}.")
    config = configs[adapter_name]
    tuner_cls = mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    if not issubclass(tuner_cls, SparseModel):
        raise ValueError(
            f"Adapter {adapter_name!r} is a {config.peft_type.value}; only sparse adapters are swapped in place here, "
            "and LoRA by peft.utils.hotswap. Load the new one under another name with load_adapter, then set_adapter "
            "and delete_adapter."
        )
    new_config = type(config).from_pretrained(model_name_or_path, **kwargs)
    if new_config.peft_type != config.peft_type:
        raise ValueError(f"The new adapter is a {new_config.peft_type.value}, not a {config.peft_type.value}.")
    others = [
        option
        for option, none in (("bias", "none"), ("modules_to_save", None), ("trainable_token_indices", None))
        if (getattr(config, option) or none) != none or (getattr(new_config, option) or none) != none
    ]
    if others:
        raise ValueError(f"Adapters with {' and '.join(others)} can't be swapped in place; use load_adapter.")
    for layer in tuner_cls.sparse_layers(model):
        if adapter_name in layer.merged_adapters:
            raise ValueError(f"Adapter {adapter_name!r} is merged into the base; unmerge it before swapping.")
    weights = load_peft_weights(model_name_or_path, device=torch_device or "cpu", **kwargs)
    with naming(model_name_or_path):
        mapped = tuner_cls._remap_adapter_state_dict_for_load(model, config, adapter_name, weights)
    places = {
        f"{prefix}.{name}": (layer, name)
        for prefix, layer in tuner_cls.layers_with(model, adapter_name)
        for name in layer.deltas[adapter_name].state_dict()
    }
    embeddings = sorted(mapped.keys() & model.state_dict().keys() - places.keys())
    if embeddings:
        raise ValueError(f"The new adapter has '{embeddings[0]}', which can't be swapped in place; use load_adapter.")
    for key, (layer, name) in places.items():
        getattr(layer.deltas[adapter_name], name).copy_(mapped[key])
    for _, layer in tuner_cls.layers_with(model, adapter_name):
        delta = layer.deltas[adapter_name]
        delta.follow_indices()  # which were checked above, as was the base
        delta.checked = True
