"""Batches in which each sample has its own adapter: `model(**inputs, adapter_names=[...])`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...hf.internals import AuxiliaryTrainingWrapper
from ..layers import BASE_ADAPTER, SparseExpertBank, SparseExperts, SparseLayer


class MixedBatchMixin:
    """The context that PEFT enters around a forward or generate call."""

    tuner_layer_cls: type[SparseLayer]
    training: bool

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """With `adapter_names` among the arguments, tell each adapted layer and each saved module (such as a head)
        which adapter each sample has; `"__base__"` is none.

        Raises:
            `ValueError`: in training mode, for unknown adapters, or for another number of names than of samples.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [m for m in self.modules() if isinstance(m, self.tuner_layer_cls)]  # type: ignore[attr-defined]
        unknown = sorted(set(adapter_names) - {name for layer in layers for name in layer.deltas} - {BASE_ADAPTER})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        samples = _number_of_samples(args, kwargs)
        if samples not in (None, len(adapter_names)):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {samples} respectively."
            )
        wrappers = [m for m in self.modules() if isinstance(m, AuxiliaryTrainingWrapper)]  # type: ignore[attr-defined]
        model_config = getattr(self.model, "generation_config", None)  # type: ignore[attr-defined]
        hook = partial(_pass_adapter_names, adapter_names, _number_of_beams(kwargs, model_config))
        called = [layer for layer in layers if not isinstance(layer, SparseExpertBank)]
        # Experts are told, for what their layers get is sorted by expert.
        experts = [
            m
            for m in self.modules()  # type: ignore[attr-defined]
            if isinstance(m, SparseExperts) and isinstance(next(iter(m.parts.values())), self.tuner_layer_cls)
        ]
        handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in (*called, *experts, *wrappers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _number_of_samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    named = (kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds", "pixel_values"))
    return next((len(x) for x in (*args[:1], *named) if isinstance(x, Tensor) and x.dim()), None)


def _number_of_beams(kwargs: dict[str, Any], model_config: Any) -> int:
    """As generate() finds it: its argument, the config passed to it, the model's own."""
    configs = (kwargs.get("generation_config"), model_config)
    found = (kwargs.get("num_beams"), *(getattr(config, "num_beams", None) for config in configs))
    return next((beams for beams in found if beams), 1)


def _pass_adapter_names(
    adapter_names: list[str], beams: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # Beam search repeats each sample for the decoder, not for an encoder: the number of rows tells which this is.
    x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    names = adapter_names
    if beams > 1 and x is not None and len(x) % (beams * len(adapter_names)) == 0:
        names = [name for name in adapter_names for _ in range(beams)]
    return args, {**kwargs, "adapter_names": names}
