"""Interface of a method for saving and loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .internals import mapping


class LoadableTuner:
    """
    Base of our tuners. PEFT's table of tuners leads from an adapter's config to its tuner (see [`tuner_of`]), so who
    saves and loads asks these methods and knows no tuner.
    """

    tuner_layer_cls: Any

    @classmethod
    def owns_key(cls, key: str) -> bool:
        """Whether a tensor's name in a state dict is that of one of this method's adapters."""
        return any(f".{container}." in f".{key}" for container in cls.tuner_layer_cls.adapter_layer_names)

    @classmethod
    def check_gathered(cls, tensors: Mapping[str, Tensor]) -> None:
        """Called before an adapter file is written.

        Raises:
            `ValueError`: if a tensor is only this process's piece of it.
        """

    @classmethod
    def check_state(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        tensors: dict[str, Tensor],
        whole_may_differ: bool = False,
    ) -> None:
        """
        Compare tensors that are about to be loaded with the adapter that awaits them; see
        `peft_ext.hf.adapter_state.check_state`.

        Raises:
            [`MalformedAdapter`]: if they are not the whole adapter and nothing else.
        """
        raise NotImplementedError

    @classmethod
    def check_arrived(cls, model: nn.Module, adapter_name: str) -> None:
        """Called once an adapter's tensors are loaded.

        Raises:
            `ValueError`: if the adapter can't be used.
        """


def tuner_of(config: Any) -> Any:
    """The tuner class that is registered for an adapter's config."""
    return mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
