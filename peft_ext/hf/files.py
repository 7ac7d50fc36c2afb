"""Adapter files: written whole or not at all, checked before use, and saying what loads them."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..io import replace


REQUIRES = "peft_ext: run `pip install peft-ext`, then `import peft_ext` before loading this adapter"
CHECKSUM_KEY = "peft_ext_sha256"


def write_weights(
    save_file: Callable[..., None], tensors: Mapping[str, Tensor], path: str, metadata: dict[str, str] | None
) -> None:
    """
    Write an adapter's file by safetensors' `save_file`. It appears whole or not at all, and carries a checksum of its
    content.
    """
    metadata = {**(metadata or {}), CHECKSUM_KEY: _checksum(tensors)}
    replace(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def local_adapter(path: str, subfolder: str, options: Mapping[str, Any]) -> str:
    """
    The folder of an adapter's files: of one on the Hub, after its weights were downloaded to the cache. Of `options`
    those are used that `hf_hub_download` takes.
    """
    folder = os.path.join(path, subfolder)
    if os.path.isdir(path):
        return folder
    places = ("revision", "token", "cache_dir", "local_files_only")
    where = {name: options[name] for name in places if options.get(name) is not None}
    try:
        return os.path.dirname(hf_hub_download(path, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder or None, **where))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError):  # who loads next says what is wrong
        return folder


def check_weights(folder: str) -> None:
    """
    Make sure that the weights of an adapter of ours in a folder are those that were saved.

    Raises:
        `ValueError`: if the file is cut short, is not a safetensors file, or differs from its checksum.
    """
    if not _is_ours(folder):
        return
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    pickled = os.path.join(folder, WEIGHTS_NAME)
    remedy = "Download or save the adapter again."
    if not os.path.isfile(path):
        if os.path.isfile(pickled) and not zipfile.is_zipfile(pickled):
            raise ValueError(f"{pickled} is cut short. {remedy}")
        return  # on the Hub, or pickled
    try:
        with safe_open(path, framework="pt") as file:
            expected = (file.metadata() or {}).get(CHECKSUM_KEY)
            if expected is None:
                return
            actual = _checksum({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}). {remedy}") from error
    if actual != expected:
        raise ValueError(f"{path} is corrupted: its content does not have the checksum it was saved with. {remedy}")


def _is_ours(folder: str) -> bool:
    try:
        with open(os.path.join(folder, CONFIG_NAME), encoding="utf-8") as file:
            return json.load(file).get("requires") == REQUIRES
    except (OSError, ValueError, AttributeError):  # PEFT's matter
        return False
