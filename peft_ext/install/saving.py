"""Saving one of our adapters writes its file whole or not at all, with a checksum of its content, and its card.

PEFT and transformers call safetensors' `save_file` directly and leave no hook around it. Where one of our adapters is
saved, their method runs with another `save_file` among its globals. The libraries' modules stay as they are, and
adapters of other methods are saved by the libraries alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from types import FunctionType
from typing import Any

from torch import Tensor

from ..hf.cards import complete_quietly
from ..hf.config import SavedConfig
from ..hf.files import write_weights
from ..hf.loadable import tuner_of


NAME = "safe_save_file"  # by which both libraries call safetensors' `save_file`


def whole_files(save_pretrained: Any) -> Callable[..., Any]:
    """Wrap `PeftModel.save_pretrained` or transformers' `PreTrainedModel.save_pretrained`."""

    @wraps(save_pretrained)
    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        configs = getattr(self, "peft_config", None)
        configs = configs.values() if isinstance(configs, dict) else ()
        tuners = {tuner_of(config) for config in configs if isinstance(config, SavedConfig)}
        if not tuners:
            return save_pretrained(self, *args, **kwargs)
        return _with_our_writer(save_pretrained, tuners)(self, *args, **kwargs)

    return save


def _with_our_writer(method: Any, tuners: set[Any]) -> Callable[..., Any]:
    """A copy of a method whose `save_file` writes our adapters' files, and leaves others to safetensors."""
    if NAME not in getattr(method, "__globals__", ()):
        warnings.warn(
            f"{method.__module__}.{method.__qualname__} does not write files with `{NAME}`, so adapter files get no "
            "checksum, and an interruption may leave half of one. Install the versions that peft_ext was tested with.",
            stacklevel=3,
        )
        return method
    save_file = method.__globals__[NAME]

    def write(tensors: Mapping[str, Tensor], filename: str | os.PathLike[str], metadata: Any = None) -> None:
        path = os.fspath(filename)
        owners = [tuner for tuner in tuners if any(tuner.owns_key(key) for key in tensors)]
        if not owners or not os.path.basename(path).startswith("adapter_model"):
            return save_file(tensors, filename, metadata=metadata)
        for tuner in owners:
            tuner.check_gathered(tensors)
        write_weights(save_file, tensors, path, metadata)
        complete_quietly(os.path.dirname(path))

    copy = FunctionType(
        method.__code__, {**method.__globals__, NAME: write}, method.__name__, method.__defaults__, method.__closure__
    )
    copy.__kwdefaults__ = method.__kwdefaults__
    return copy
