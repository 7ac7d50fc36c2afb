"""Loading one of our adapters succeeds as a whole or leaves the model as it was, by PEFT and by transformers.

Both inject an adapter's layers before they read its tensors, and tell no method that they are about to. So the three
methods that load are wrapped (see `wrappers.py`). Inside them our tuners make room for the checkpoint's entries and
choose none. The file is checked first, its tensors once the layers that await them are there, and a failure takes a
new adapter out again. Adapters of other methods pass through.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..hf.adapter_state import naming
from ..hf.config import SavedConfig
from ..hf.files import check_weights, local_adapter
from ..hf.injection import loading
from ..hf.loadable import tuner_of
from .snapshot import Snapshot


class _Attempt:
    """One call that loads an adapter. It does nothing until one of our tuners begins to inject it."""

    def __init__(self, model: Any, adapter_name: str) -> None:
        self.model = model
        self.adapter_name = adapter_name
        self.before: Snapshot | None = None
        self.checks = ExitStack()

    def begin(self, config: SavedConfig) -> None:
        """Keep the model's state, and have transformers' loader check the tensors."""
        self.before = Snapshot(self.model)
        self.was_adapted = "peft_config" in vars(self._base())
        if isinstance(self.model, PreTrainedModel):
            self.checks.enter_context(_checked_by_transformers(self.model, config, self.adapter_name))

    def undo(self) -> None:
        """Leave the model as it was, if an adapter of ours was begun."""
        if self.before is None:
            return
        configs = getattr(self.model, "peft_config", {})
        self.before.restore()
        configs.pop(self.adapter_name, None)
        if not self.was_adapted:
            for attribute in ("peft_config", "_hf_peft_config_loaded"):
                vars(self._base()).pop(attribute, None)

    def _base(self) -> Any:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model


def whole_model(from_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function of `PeftModel.from_pretrained`, which injects a model's adapter and then calls
    `load_adapter`."""
    signature = inspect.signature(from_pretrained)

    @wraps(from_pretrained)
    def load(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        attempt = _Attempt(given["model"], given.get("adapter_name", "default"))
        try:
            with loading(attempt.begin):
                return from_pretrained(*args, **kwargs)
        except BaseException:
            attempt.undo()
            raise

    return load


def all_or_nothing(load_adapter: Callable[..., Any], path_argument: str) -> Callable[..., Any]:
    """
    Wrap `PeftModel.load_adapter` or transformers' `PeftAdapterMixin.load_adapter`. `path_argument` names the argument
    that holds the adapter's folder or Hub id.
    """
    signature = inspect.signature(load_adapter)

    @wraps(load_adapter)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        name = given.get("adapter_name") or "default"
        path = given.get(path_argument) or getattr(given.get("load_config"), "pretrained_model_name_or_path", None)
        attempt = _Attempt(self, name)
        try:
            if path is not None:
                options = {**given, **(given.get("adapter_kwargs") or {}), **given.get("kwargs", {})}
                check_weights(local_adapter(path, options.get("subfolder") or "", options))
            with attempt.checks, loading(attempt.begin), naming(path):
                result = load_adapter(self, *args, **kwargs)
            config = self.peft_config[name]
            if isinstance(config, SavedConfig):
                _check_arrived(self, name, config, result)
                config.awaits_weights = False
            return result
        except BaseException as error:
            is_ours = isinstance(getattr(self, "peft_config", {}).get(name), SavedConfig)
            attempt.undo()
            if is_ours and isinstance(error, KeyError):  # PEFT's way to say that a saved module is missing
                raise ValueError(f"The checkpoint {path} lacks {error}. Save the whole adapter again.") from error
            raise

    return load


@contextmanager
def _checked_by_transformers(model: Any, config: SavedConfig, adapter_name: str) -> Iterator[None]:
    """
    Have an adapter of ours checked between its injection and the loading of its tensors where transformers loads it,
    which asks no method, casts what does not fit, and only logs what is missing. PEFT asks the method itself.
    """
    load = model._load_pretrained_model

    def checked(**arguments: Any) -> Any:
        named, may_differ = _named_as_loaded(**arguments), arguments["load_config"].ignore_mismatched_sizes
        tuner_of(config).check_state(model, config, adapter_name, named, whole_may_differ=may_differ)
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


def _check_arrived(model: nn.Module, adapter_name: str, config: SavedConfig, result: Any) -> None:
    """Check that the tensors of the file have arrived in the model."""
    tuner = tuner_of(config)
    missing = [
        key for key in getattr(result, "missing_keys", ()) if tuner.owns_key(key) and f".{adapter_name}." in key
    ]
    if missing:
        raise ValueError(
            f"Adapter '{adapter_name}' can't be loaded: '{min(missing)}' was not found in the file, as happens in "
            "layers that torch's checkpoint wrapper holds. Load the adapter first, and wrap the layers afterwards."
        )
    tuner.check_arrived(model, adapter_name)
