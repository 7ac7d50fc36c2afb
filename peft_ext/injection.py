"""What adding an adapter must leave behind when it is refused: nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def clean_refusal(peft_config: dict[str, Any], model: nn.Module, adapter_name: str) -> Iterator[None]:
    """
    Around the injection of an adapter: note what was trainable before, and on an error forget the adapter again.

    Args:
        peft_config (`dict`): the tuner's table of configurations, which has the adapter's already.
        model (`torch.nn.Module`): the base model.
        adapter_name (`str`): the adapter.
    """
    config = peft_config[adapter_name]
    config.awaits_weights = config.from_checkpoint
    config.trainable_before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    except BaseException:
        peft_config.pop(adapter_name, None)  # transformers shares this table with the adapters before
        # transformers marks the model as adapted before it calls us, and then expects a `peft_config` on it.
        if getattr(model, "_hf_peft_config_loaded", False) and not hasattr(model, "peft_config"):
            model.__dict__.pop("_hf_peft_config_loaded", None)
        raise
