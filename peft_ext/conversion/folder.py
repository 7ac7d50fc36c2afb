"""Adapters of SHiRA and Super-Tuning in a folder: read, and loaded onto the base model that they are for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor, nn

from ..hf.adapter_state import PEFT_PREFIX, MalformedAdapter, check_others, naming, trained_whole
from ..hf.injection import check_adapter_name
from ..hf.internals import BaseTunerLayer, load_peft_weights
from ..install.snapshot import unchanged_on_error
from .peers import CONVERTIBLE, check_convertible


PLACES = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")
LOAD_OPTIONS = (
    "adapter_name",
    "is_trainable",
    "autocast_adapter_dtype",
    "low_cpu_mem_usage",
    "key_mapping",
    "torch_device",
    *PLACES,
)
_VALUES = (".shira_weight", ".supertuning_values")
_INDICES = (".shira_indices", ".supertuning_indices")


def read_config(path: str, **places: Any) -> PeftConfig:
    """
    The configuration of an adapter that can be converted, in a folder or on the Hub (`places`: see `PLACES`).

    Raises `TypeError` if the adapter is of another method, and `ValueError` if there is none, or it has parts that are
    not sparse.
    """
    try:
        config = PeftConfig.from_pretrained(path, **places)
    except KeyError as error:  # of a method that needs another version of PEFT, or a package beside it
        known = " and ".join(kind.value for kind in CONVERTIBLE)
        raise TypeError(
            f"The adapter {path!r} is of the method {error}, which this PEFT does not know; only adapters of {known} "
            "can be converted."
        ) from error
    except (ValueError, OSError) as error:
        what = "this folder has no adapter" if os.path.isdir(path) else "no such folder, and no adapter on the Hub"
        raise ValueError(
            f"model={path!r}: {what} that can be read ({error.__cause__ or error}). Pass the folder that "
            "`save_pretrained` wrote adapter_config.json to, or the id of an adapter that can be reached."
        ) from error
    check_convertible(path, config)
    return config


@contextmanager
def loaded(path: str, base_model: Any, options: Mapping[str, Any]) -> Iterator[PeftModel]:
    """
    An adapter, of a folder or the Hub, on its base model; `options` are some of `LOAD_OPTIONS`. If loading it or the
    work that follows fails, the base model is left as it was. Raises as [`peft_ext.convert`] does.
    """
    unknown = sorted(options.keys() - set(LOAD_OPTIONS))
    if unknown:
        raise TypeError(
            f"load_options has {', '.join(unknown)}, which convert does not know. Known are {', '.join(LOAD_OPTIONS)}."
        )
    name = options.get("adapter_name", "default")
    check_adapter_name(name)
    if not isinstance(base_model, nn.Module):
        raise ValueError(f"base_model={base_model!r} must be the model to load the adapter {path!r} onto.")
    if isinstance(base_model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in base_model.modules()):
        raise ValueError(
            f"base_model is a {type(base_model).__name__}, which has adapters already. Pass the model beneath; or "
            f"load {path!r} with load_adapter and convert the whole."
        )
    places = {key: options[key] for key in PLACES if key in options}
    config = read_config(path, **places)
    mapping = options.get("key_mapping") or getattr(base_model, "_checkpoint_conversion_mapping", None)
    weights = _read_weights(path, mapping, places)
    # PEFT saves embeddings that were resized along with an adapter, and loads them in place.
    state = base_model.state_dict()
    in_file = {key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".") for key in weights} & state.keys()
    with naming(path), unchanged_on_error(base_model, [state[name] for name in in_file]):
        _check_entries(weights)
        try:
            model = PeftModel.from_pretrained(base_model, path, **options)
            misfit: Any = _misfit(base_model, weights, name)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            misfit = _misfit(base_model, weights, name) or error
        if misfit is not None:
            own = f", {config.base_model_name_or_path!r}" if config.base_model_name_or_path else ""
            raise ValueError(
                f"base_model, a {type(base_model).__name__}, does not fit the adapter {path!r}: {misfit} Pass the "
                f"model that the adapter was trained on{own}."
            )
        _check_others(base_model, weights, name)
        yield model


def _read_weights(path: str, mapping: dict[str, str] | None, places: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an adapter's file, on the CPU."""
    folder = os.path.join(path, places.get("subfolder") or "")
    files = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    if os.path.isdir(folder) and not any(os.path.isfile(os.path.join(folder, file)) for file in files):
        raise ValueError(f"{folder} has no weights ({' or '.join(files)}). Save or download the adapter again.")
    try:
        return load_peft_weights(path, device="cpu", key_mapping=mapping, **places)
    except SafetensorError as error:
        raise ValueError(
            f"The weights in {folder} are not a whole safetensors file ({error}). Save or download the adapter again."
        ) from error


def _check_entries(weights: Mapping[str, Tensor]) -> None:
    """Values are finite, and indices whole numbers that PEFT's int32 can hold, though Windows saves them as floats."""
    for key, tensor in weights.items():
        if key.endswith(_VALUES) and not bool(torch.isfinite(tensor).all()):
            raise MalformedAdapter(f"'{key}' has values that are not finite; save the adapter again.")
        if key.endswith(_INDICES) and tensor.numel():
            numbers = tensor.double()
            if not bool(((numbers >= 0) & (numbers < 2**31) & (numbers == numbers.trunc())).all()):
                raise MalformedAdapter(f"'{key}' has numbers that are no indices; save the adapter again.")


def _check_others(base: nn.Module, weights: Mapping[str, Tensor], adapter_name: str) -> None:
    """The file brings nothing but the adapter, modules that it trains whole, and embeddings."""
    whole = {saved for saved, _ in trained_whole(base, adapter_name)}
    named = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in weights.items()}
    own = (*_VALUES, *_INDICES)
    check_others(base, base.state_dict(), {k: t for k, t in named.items() if k not in whole and not k.endswith(own)})


def _misfit(base: nn.Module, weights: Mapping[str, Tensor], adapter_name: str) -> str | None:
    """Differences between an adapter's file and the places that PEFT made for it in a model."""
    places = {}
    for key, tensor in base.state_dict().items():
        name = key.removesuffix(f".{adapter_name}").replace(f".modules_to_save.{adapter_name}.", ".")
        if name != key and (name.endswith(_VALUES) or ".modules_to_save." in key):
            places[name] = tensor.shape
    found = {key.removeprefix(PEFT_PREFIX): tensor.shape for key, tensor in weights.items()}
    missing = sorted(places.keys() - found.keys())
    unplaced = sorted(key for key in found.keys() - places.keys() if key.endswith(_VALUES))
    reshaped = sorted(key for key in places.keys() & found.keys() if places[key] != found[key])
    if unplaced:
        return f"it has no place for '{unplaced[0]}' ({len(unplaced)} in all)."
    if missing:
        return f"the adapter has nothing for '{missing[0]}' ({len(missing)} in all)."
    if reshaped:
        here, there = (tuple(shapes[reshaped[0]]) for shapes in (places, found))
        return f"'{reshaped[0]}' has the shape {there} in the adapter and {here} here ({len(reshaped)} in all)."
    return None
