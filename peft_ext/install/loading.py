"""Loading one of our adapters succeeds as a whole or leaves the model as it was, by PEFT and by transformers.

Both inject an adapter's layers before they read its weights, and tell no method that they are about to. So the three
methods that do it are wrapped: `PeftModel.from_pretrained`, `PeftModel.load_adapter` and transformers' `load_adapter`.
Inside them, our tuners make room for the checkpoint's entries and choose none. The file is checked first, its tensors
once the layers are there that await them, and a failure takes a new adapter out again. Adapters of other methods pass
through.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.peft import PeftAdapterMixin

from ..hf.adapter_state import naming
from ..hf.config import SavedConfig
from ..hf.files import check_weights
from ..hf.injection import loading
from ..hf.internals import AuxiliaryTrainingWrapper, mapping
from ..sparse.bases.projection import Projection
from ..sparse.layers import SparseLayer, SparseMultiheadAttention
from ..tuners.mores.model import take_out as take_out_steering
from .snapshot import Snapshot


def make_loading_all_or_nothing() -> None:
    """Wrap the methods of PEFT and transformers that load adapters. Calling it again changes nothing."""
    for owner, path_argument in ((peft.PeftModel, "model_id"), (PeftAdapterMixin, "peft_model_id")):
        owner.load_adapter = all_or_nothing(_original(owner.load_adapter), path_argument)
    from_pretrained = _original(peft.PeftModel.from_pretrained.__func__)

    @wraps(from_pretrained)
    def load(*args: Any, **kwargs: Any) -> Any:
        with loading():
            return from_pretrained(*args, **kwargs)

    load.is_ours = True  # type: ignore[attr-defined]
    peft.PeftModel.from_pretrained = classmethod(load)


def _original(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method without the wrapper that an earlier import of this package has put around it."""
    return method.__wrapped__ if hasattr(method, "is_ours") else method  # type: ignore[attr-defined]


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
            with loading(), naming(path), _checked_by_transformers(self, name):
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

    load.is_ours = True  # type: ignore[attr-defined]
    return load


@contextmanager
def _checked_by_transformers(model: Any, adapter_name: str) -> Iterator[None]:
    """
    Have an adapter of ours checked between its injection and the loading of its tensors where transformers loads it,
    which asks no method, casts what does not fit, and only logs what is missing. PEFT asks the method itself.
    """
    if not isinstance(model, PreTrainedModel):
        yield
        return
    load = model._load_pretrained_model

    def checked(**arguments: Any) -> Any:
        config = model.peft_config[adapter_name]
        if isinstance(config, SavedConfig):
            method = mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
            named, may_differ = _named_as_loaded(**arguments), arguments["load_config"].ignore_mismatched_sizes
            method.check_state(model, config, adapter_name, named, whole_may_differ=may_differ)
        return load(**arguments)

    model._load_pretrained_model = checked
    try:
        yield
    finally:
        del model._load_pretrained_model


def _named_as_loaded(
    model: Any, state_dict: dict[str, Tensor] | None, checkpoint_files: list[str] | None, load_config: Any, **_: Any
) -> dict[str, Tensor]:
    """The tensors that transformers is about to load, by the names in the model that it gives them."""
    tensors = dict(state_dict or {})
    for file in checkpoint_files or () if state_dict is None else ():
        safe = file.endswith(".safetensors")
        tensors.update(load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True))
    rules = copy.deepcopy(load_config.weight_mapping or [])  # which note that they were used
    renamings, converters = ([r for r in rules if isinstance(r, kind)] for kind in (WeightRenaming, WeightConverter))
    state = model.state_dict()
    named = {}
    for key, tensor in tensors.items():
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, _ = rename_source_key(key, [], [], model.base_model_prefix, state)
        named[name] = tensor
    return named


def _check_arrived(model: nn.Module, adapter_name: str, result: Any) -> None:
    """What was checked before is where it belongs."""
    missing = [
        key
        for key in getattr(result, "missing_keys", ())
        if re.search(rf"\.(\w+_delta|mores_steering)\.{re.escape(adapter_name)}\.", key)
    ]
    if missing:
        raise ValueError(
            f"Adapter '{adapter_name}' can't be loaded: '{min(missing)}' was not found in the file, as happens in "
            "layers that torch's checkpoint wrapper holds. Load the adapter first, and wrap the layers afterwards."
        )
    for layer in model.modules():
        if isinstance(layer, SparseLayer) and adapter_name in layer.deltas:
            layer._ready(adapter_name)


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
