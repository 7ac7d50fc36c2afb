"""Check an adapter's tensors before they are loaded, whichever way they come: a file may bring the adapter only."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .internals import AuxiliaryTrainingWrapper


PEFT_PREFIX = "base_model.model."  # of the names in an adapter's file
_SAVE_AGAIN = "Nothing was loaded; save the whole adapter again."
_SAME_MODEL = "Nothing was loaded; use the config and base model it was saved with."


class MalformedAdapter(ValueError):
    """An adapter's tensors are not an adapter for this model. Nothing was changed."""


@contextmanager
def naming(path: Any) -> Iterator[None]:
    """Let errors about malformed tensors name the file or folder that they come from, where it is known."""
    try:
        yield
    except MalformedAdapter as error:
        if path is None or str(path) in str(error):
            raise
        raise MalformedAdapter(f"{path}: {error}") from error


def without_wrappers(name: str) -> str:
    """A module's name as the keys of a state dict have it: without FSDP1's and activation checkpointing's wrappers."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def check_state(
    model: nn.Module,
    adapter_name: str,
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    container: str,
    biases: Iterable[str] = (),
    whole_may_differ: bool = False,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """
    Compare tensors that are about to be loaded with the adapter that awaits them. Tensors that belong to nothing in
    the model are named in a warning; so are embeddings, which PEFT saves with an adapter, if they differ from the
    model's.

    Args:
        model (`torch.nn.Module`): the model with the adapter's layers.
        adapter_name (`str`): the adapter.
        tensors (`dict[str, torch.Tensor]`): by their names in the model.
        own (`dict[str, torch.Tensor]`): the adapter's tensors in the model, by name.
        container (`str`): the part of their names that only this method's adapters have.
        biases (`Iterable[str]`): names of the base model's biases that the adapter trains.
        whole_may_differ (`bool`):
            Leave it to who loads to refuse modules that are trained whole and have another size, such as a head for
            other labels, or to pass over them (`ignore_mismatched_sizes`).
        state (`dict[str, torch.Tensor]`, *optional*): the model's state dict, if it is at hand.

    Raises:
        [`MalformedAdapter`]: if a tensor is missing, has no place, does not fit, is not finite, or would overwrite a
            frozen tensor of the base model.
    """
    state = model.state_dict() if state is None else state
    if not any(key.startswith(PEFT_PREFIX) for key in state):
        tensors = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    part = f"so it is only a part of adapter '{adapter_name}' or was made with other options"
    for key, here in own.items():
        _check_tensor(key, tensors, here, part)
        if tensors[key].shape != here.shape:
            raise MalformedAdapter(_other_shape(key, tensors[key], here))
    unknown = min((key for key in tensors if f".{container}." in f".{key}" and key not in own), default=None)
    if unknown is not None:
        raise MalformedAdapter(f"The checkpoint has '{unknown}', which has no place in this model. {_SAME_MODEL}")
    parameters = {without_wrappers(name) for name, _ in model.named_parameters()}
    whole = (key for _, key in trained_whole(model, adapter_name))
    trained = {key for key in (*whole, *biases) if key not in own}
    for key in sorted(trained):
        # A module that is trained whole may have infinite numbers in a buffer, such as a mask.
        _check_tensor(key, tensors, state.get(key), f"which adapter '{adapter_name}' trains", key in parameters)
    writes_base = check_others(model, state, {k: t for k, t in tensors.items() if k not in own and k not in trained})
    for key in sorted(trained & state.keys()) if writes_base or not whole_may_differ else ():
        if not _fits(tensors[key], state[key]):
            raise MalformedAdapter(_other_shape(key, tensors[key], state[key]))


def trained_whole(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, str]]:
    """Names in a file and in the model: of tensors of modules that PEFT trains whole, and of trained tokens."""
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for saved, key in module.adapter_state_dict_load_map(adapter_name).items():
                yield f"{without_wrappers(name)}.{saved}", f"{without_wrappers(name)}.{key}"


def _check_tensor(
    key: str, tensors: Mapping[str, Tensor], here: Tensor | None, role: str, finite: bool = True
) -> None:
    """It is there, and holds numbers of the kind that the model has."""
    if key not in tensors:
        raise MalformedAdapter(f"The checkpoint lacks '{key}', {role}. {_SAVE_AGAIN}")
    tensor = tensors[key]
    if here is not None and _kind(tensor.dtype) != _kind(here.dtype):
        raise MalformedAdapter(
            f"'{key}' holds {tensor.dtype} in the checkpoint, where {_kind(here.dtype)} numbers belong. A file whose "
            f"tensors were all cast to one type looks so: only values may be cast. {_SAVE_AGAIN}"
        )
    if finite and tensor.is_floating_point() and not tensor.is_meta and not _is_finite(tensor):
        raise MalformedAdapter(f"'{key}' has values that are not finite in the checkpoint. {_SAVE_AGAIN}")


def _is_finite(tensor: Tensor) -> bool:
    numbers = tensor if tensor.element_size() > 1 else tensor.float()
    return bool((numbers * 0).sum() == 0)  # a tenth of the time of `isfinite`: NaN and infinity times zero are NaN


def _fits(tensor: Tensor, here: Tensor) -> bool:
    """Equal shapes; of a parameter that DeepSpeed ZeRO-3 has emptied the shape is not known here."""
    return tensor.shape == here.shape or here.numel() == 0


def _other_shape(key: str, tensor: Tensor, here: Tensor) -> str:
    return (
        f"'{key}' has shape {tuple(tensor.shape)} in the checkpoint, but the config and the base model lead to "
        f"{tuple(here.shape)}. {_SAME_MODEL}"
    )


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "floating-point"
    if dtype.is_complex:
        return "complex"
    return "boolean" if dtype == torch.bool else "whole"


def check_others(model: nn.Module, state: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """
    Check tensors that are not the adapter's: none of the base model but embeddings. Returns whether loading them
    changes the base model. Raises [`MalformedAdapter`] if one would overwrite a frozen tensor of the model, or does
    not fit.
    """
    base = {_plain(key): tensor for key, tensor in state.items()}
    places = {key: base[_plain(key)] for key in sorted(others) if _plain(key) in base}
    embeddings = tuple(f"{_plain(name)}." for name in _embeddings(model)) if places else ()
    for key, here in places.items():
        if not _plain(key).startswith(embeddings):
            raise MalformedAdapter(
                f"The checkpoint has '{key}', which is no part of the adapter: it would overwrite a frozen tensor of "
                "the model. Nothing was loaded; remove it from the file, or use the config it was saved with."
            )
        _check_tensor(key, others, here, "")
        if not _fits(others[key], here):
            raise MalformedAdapter(_other_shape(key, others[key], here))
    # With bias="all" PEFT saves the biases of a module that is trained whole a second time, under a name like this.
    strangers = sorted(key for key in others.keys() - places.keys() if ".modules_to_save." not in key)
    if strangers:
        warnings.warn(
            f"The checkpoint has tensors that belong to nothing in this model and are ignored: {_some(strangers)}.",
            stacklevel=2,
        )
    changed = [key for key, here in places.items() if not _is_equal(others[key], here)]
    if changed:
        warnings.warn(
            f"The checkpoint brings embeddings ({_some(changed)}), as PEFT saves them when they are targeted or the "
            "vocabulary was resized. They replace the base model's, for all of its adapters.",
            stacklevel=2,
        )
    return bool(changed)


def _is_equal(tensor: Tensor, here: Tensor) -> bool:
    if here.is_meta or tensor.is_meta or isinstance(here, DTensor) or tensor.shape != here.shape:
        return False
    return torch.equal(tensor.to(here.device, here.dtype), here)


def _plain(key: str) -> str:
    """A tensor's name as the base model has it without adapters."""
    return key.replace(".base_layer.", ".")


def _embeddings(model: Any) -> Iterator[str]:
    """Names of the modules that PEFT saves with an adapter on demand."""
    try:
        modules = (model.get_input_embeddings(), model.get_output_embeddings())
    except (AttributeError, NotImplementedError):  # no transformers model, or one that has none
        return
    for name, module in model.named_modules():
        if module in modules:
            yield without_wrappers(name)


def _some(keys: list[str]) -> str:
    return ", ".join(f"'{key}'" for key in keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
