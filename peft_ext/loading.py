"""Loading one of our adapters succeeds as a whole or leaves the model as it was, by PEFT and by transformers.

Both inject an adapter's layers before they read its weights, and transformers only logs what is missing. So their
`load_adapter` is wrapped: the file is checked first, what arrived is checked after, and a failure takes a new adapter
out again. Adapters of other methods pass through.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from ._peft_internals import AuxiliaryTrainingWrapper
from .files import check_weights
from .saved_config import SavedConfig
from .snapshot import Snapshot
from .sparse.layers import SparseLayer, SparseMultiheadAttention
from .sparse.projection import Projection
from .tuners.mores.checkpoint import check_arrived
from .tuners.mores.model import take_out as take_out_steering


def all_or_nothing(load_adapter: Callable[..., Any], path_argument: str) -> Callable[..., Any]:
    """
    Wrap `PeftModel.load_adapter` or transformers' `PeftAdapterMixin.load_adapter`.

    Args:
        load_adapter (`Callable`): the method.
        path_argument (`str`): its argument that holds the adapter's folder or Hub id.
    """
    signature = inspect.signature(load_adapter)

    @wraps(load_adapter)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        name = given.get("adapter_name") or "default"
        known = name in getattr(self, "peft_config", {})
        before = Snapshot(self)
        path = given.get(path_argument) or getattr(given.get("load_config"), "pretrained_model_name_or_path", None)
        try:
            if path is not None:
                subfolder = {**(given.get("adapter_kwargs") or {}), **given.get("kwargs", {})}.get("subfolder") or ""
                check_weights(os.path.join(path, subfolder))
            result = load_adapter(self, *args, **kwargs)
            config = self.peft_config[name]
            if isinstance(config, SavedConfig):
                _check_arrived(self, name, result)
                config.awaits_weights = False
            return result
        except BaseException as error:
            config = getattr(self, "peft_config", {}).get(name)
            if isinstance(config, SavedConfig) and (config.awaits_weights or not known):
                take_out(self, name)
                if not known:
                    before.restore()
                before.restore_modes()
                if isinstance(error, KeyError):  # PEFT's way to say that a saved module is missing
                    raise ValueError(f"The checkpoint {path} lacks {error}. Save the whole adapter again.") from error
            raise

    load.is_all_or_nothing = True  # type: ignore[attr-defined]
    return load


def _check_arrived(model: nn.Module, adapter_name: str, result: Any) -> None:
    missing = [
        key
        for key in getattr(result, "missing_keys", ())
        if re.search(rf"\.(\w+_delta|mores_steering|modules_to_save)\.{re.escape(adapter_name)}\.", key)
        or key.endswith(f".trainable_tokens_delta.{adapter_name}")
    ]
    if missing and any("_checkpoint_wrapped_module" in name for name, _ in model.named_modules()):
        raise ValueError(
            f"Adapter '{adapter_name}' can't be loaded into layers that torch's checkpoint wrapper holds, where PEFT "
            "does not look for its tensors. Load the adapter first, and wrap the layers afterwards."
        )
    if missing:
        raise ValueError(
            f"The checkpoint lacks '{min(missing)}', so it is only a part of adapter '{adapter_name}' or was made "
            "with other options. Save the whole adapter again."
        )
    unknown = sorted(key for key in getattr(result, "unexpected_keys", ()) if ".mores_steering." in key)
    if unknown:
        raise ValueError(
            f"The checkpoint has '{unknown[0]}', which has no place in this model; use the config and base model it "
            "was saved with."
        )
    for layer in model.modules():
        if isinstance(layer, SparseLayer) and adapter_name in layer.deltas:
            layer._ready(adapter_name)
    check_arrived(model, adapter_name)


def take_out(model: Any, adapter_name: str) -> None:
    """Undo the injection of an adapter whose weights could not be loaded."""
    config = model.peft_config[adapter_name]
    if len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
        return
    take_out_steering(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLayer) and isinstance(module.get_base_layer(), Projection):
            continue  # goes with its attention
        if isinstance(module, (SparseLayer, SparseMultiheadAttention)):
            original = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            original = module.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, original)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for parameter_name, parameter in base.named_parameters():
        parameter.requires_grad_(config.trainable_before.get(parameter_name, parameter.requires_grad))
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        base.__dict__.pop(attribute, None)
