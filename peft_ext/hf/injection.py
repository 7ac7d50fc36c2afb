"""Add an adapter to a model: whether a checkpoint is about to bring its tensors, and rollback when it is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn
from transformers.integrations.peft import PeftAdapterMixin


Begin = Callable[[Any], None]
_begin: ContextVar[Begin | None] = ContextVar("begin", default=None)


@contextmanager
def loading(begin: Begin) -> Iterator[None]:
    """
    Around a call that adds an adapter and then reads its tensors from a checkpoint; see `install/loading.py`. `begin`
    is called with the config of an adapter that one of our tuners is about to inject.
    """
    token = _begin.set(begin)
    try:
        yield
    finally:
        _begin.reset(token)


def is_loading() -> bool:
    """Whether a checkpoint brings the tensors of the adapter that is being added, so that nothing need be chosen."""
    return is_wrapped() or _began_before_us()


def is_wrapped() -> bool:
    """Whether a call that loads has our wrapper around it."""
    return _begin.get() is not None


def _began_before_us() -> bool:
    """
    Whether a call of transformers' `load_adapter` runs that has no wrapper. It imports PEFT, and where PEFT imports us
    (see `install/autoload.py`) the first such call has begun before there was a wrapper.
    """
    code = inspect.unwrap(PeftAdapterMixin.load_adapter).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def check_adapter_name(name: Any) -> None:
    """
    Raises:
        `ValueError`: if torch's containers of modules, which PEFT keeps adapters in, can't have such a name.
    """
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"adapter_name={name!r} must be a text that is not empty, has no dot and is no method of torch's "
            "containers, such as 'keys'; choose another name."
        )


@contextmanager
def clean_refusal(peft_config: dict[str, Any], model: nn.Module, adapter_name: str) -> Iterator[None]:
    """
    Around the injection of an adapter, which `peft_config` has already: check its name, tell a load that it begins,
    and on an error forget the adapter again.
    """
    config = peft_config[adapter_name]
    begin = _begin.get()
    config.awaits_weights = is_loading()
    try:
        check_adapter_name(adapter_name)
        if begin is not None:
            begin(config)
        yield
    except BaseException:
        peft_config.pop(adapter_name, None)  # transformers shares this table with the adapters before
        # transformers marks the model as adapted before it calls us, and then expects a `peft_config` on it.
        if getattr(model, "_hf_peft_config_loaded", False) and not hasattr(model, "peft_config"):
            model.__dict__.pop("_hf_peft_config_loaded", None)
        raise
