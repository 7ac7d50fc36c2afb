"""The configs that PEFT's tests are run against: one line each."""

import importlib
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig


@dataclass(frozen=True)
class Method:
    """
    A config under test and what its layers can do.

    Args:
        config (`str`):
            Where the config class is found, as `module:Class`.
        kwargs (`dict`):
            Passed to every config. The toy models of PEFT's tests end in a ReLU of twenty neurons, of which some are
            dead: with one entry per neuron an adapter may change nothing, which their sanity checks refuse.
        variants (`tuple[dict, ...]`):
            Further settings; each of them runs through the whole matrix of the custom models.
        layers (`tuple[str, ...]`):
            Class names of the layers that the method can target.
        parameter (`str`):
            Where a layer keeps what it trains, with `{layer}.{parameter}.{adapter}.weight` for the parameter.
        mixed_batches, weighted_adapters (`bool`):
            Whether `adapter_names=` and `add_weighted_adapter` are supported. PEFT's tests skip them for all but the
            methods that they name, so a method that has them takes the place of one of these, see `stand_in.py`.
    """

    config: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    variants: tuple[dict[str, Any], ...] = ()
    layers: tuple[str, ...] = ("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention")
    parameter: str = "neuroada_delta"
    mixed_batches: bool = True
    weighted_adapters: bool = True

    @property
    def config_class(self) -> type[PeftConfig]:
        module, _, name = self.config.partition(":")
        return getattr(importlib.import_module(module), name)


_NEUROADA_VARIANTS = (
    {"backend": "bypass"},
    {"backend": "folded"},
    {"backend": "dense"},
    {"backend": "reference"},
    {"selection": "random", "neuron_ratio": 0.5},
    {"k": 1000},  # capped at the fan-in
)

# GPS is run by magnitude, since PEFT's tests have no data to score by; its trained biases and heads are what is new.
METHODS = {
    "neuroada": Method("peft_ext:NeuroAdaConfig", {"k": 4}, _NEUROADA_VARIANTS),
    "gps": Method(
        "peft_ext:GPSConfig",
        {"k": 4, "selection": "magnitude"},
        ({"train_bias": False}, {"backend": "dense"}, {"selection": "magnitude_network"}),
        parameter="gps_delta",
    ),
    "psn": Method(
        "peft_ext:PSNConfig",
        {"density": 0.5},
        ({"density": None, "k": 3}, {"train_bias": True}),
        parameter="psn_delta",
    ),
}
