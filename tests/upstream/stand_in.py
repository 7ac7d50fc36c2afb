"""Lets a config play the part of LoRA, the method that PEFT uses wherever a test is about no method in particular."""

import contextlib
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from .methods import Method


# Arguments of LoRA without a counterpart that change nothing in what such a test checks.
_DROPPED = {"r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "inference_mode"}
_KEPT = {
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "task_type",
    "trainable_token_indices", "base_model_name_or_path", "revision",
}  # fmt: skip


# Test modules that use another method of PEFT as their example.
PARTS = {"test_lora_conversion": "LoKrConfig"}


def stand_in(method: Method) -> type[PeftConfig]:
    """A class to put in the place of `LoraConfig`: calling it gives the method's config."""
    config_class = method.config_class

    class StandIn(config_class):  # type: ignore[valid-type,misc]
        def __new__(cls, **kwargs: Any) -> Any:
            # The result is no instance of this class, so Python does not call `__init__` with LoRA's arguments.
            return config_class(**translate(kwargs, method))

    return StandIn


def translate(kwargs: dict[str, Any], method: Method) -> dict[str, Any]:
    """Rewrites LoRA's arguments; a test that gives one that only LoRA has is skipped for that reason."""
    translated = dict(method.kwargs)
    for key, value in kwargs.items():
        if key in _KEPT:
            translated[key] = value
        elif key in ("init_weights", "init_lora_weights") and isinstance(value, bool):
            translated["init_weights"] = value
        elif key == "bias":
            prefix = method.config_class().peft_type.value.lower()
            translated[key] = f"{prefix}_only" if value == "lora_only" else value
        elif value and key not in _DROPPED:
            pytest.skip(f"uses `{key}`, an argument of LoRA alone")
    return translated


def take_places(tests: ModuleType, common: ModuleType, method: Method) -> None:
    """
    Rebinds the names of PEFT's configs in a test module and in the helpers that all of them share.

    The shared helpers skip what a method does not support by comparing its class with those of PEFT, so a method that
    supports it stands in for one that the helper knows: for RoAd in mixed batches, for IA3 in weighted combinations
    (LoRA's are SVDs of low-rank factors), for LoHa in GPT-2's `Conv1D`.
    """
    part = PARTS.get(tests.__name__.rpartition(".")[2], "LoraConfig")
    _rebind(tests, part, stand_in(method))
    _rebind(tests, "LoraLayer", PEFT_TYPE_TO_TUNER_MAPPING[method.config_class().peft_type].tuner_layer_cls)
    # It means to skip models without biases for BEFT; a slip (`isinstance` of a class) skips them for all methods.
    _rebind(tests, "check_beft_config", lambda *args: None)
    _expect_parameters(getattr(tests, "TestRequiresGrad", None), method)
    supported = {
        "RoadConfig": method.mixed_batches,
        "IA3Config": method.weighted_adapters,
        "LoHaConfig": "Conv1D" in method.layers,
    }
    for name, is_supported in supported.items():
        if is_supported:
            _rebind(common, name, method.config_class)


def _rebind(module: ModuleType, name: str, value: Any) -> None:
    if hasattr(module, name):
        setattr(module, name, value)


def _expect_parameters(requires_grad_tests: Any, method: Method) -> None:
    """Has the tests of `requires_grad`, which name LoRA's two factors, expect the method's one parameter instead."""
    if requires_grad_tests is None or hasattr(requires_grad_tests, "check_original"):
        return
    original = requires_grad_tests.check_requires_grad
    requires_grad_tests.check_original = original

    def check_requires_grad(self: Any, model: Any, *expected: str) -> None:
        ours = [re.sub(r"\.lora_A\.(\w+)\.weight$", rf".{method.parameter}.\1.weight", name) for name in expected]
        original(self, model, *(name for name in ours if not re.search(r"\.lora_B\.\w+\.weight$", name)))

    requires_grad_tests.check_requires_grad = check_requires_grad


@contextlib.contextmanager
def as_lora(tests: ModuleType, common: ModuleType, method: Method) -> Iterator[None]:
    """Lets the tests of mixed batches, which look whether a config is LoRA's, take the method's for it."""
    names: dict[str, Any] = {"LoraConfig": method.config_class}
    with mock.patch.multiple(tests, **names), mock.patch.multiple(common, **names):
        yield


@contextlib.contextmanager
def equal_toy_models() -> Iterator[None]:
    """
    Gives every `nn.Linear` of a shape the same weights.

    Some tests load an adapter onto a newly made random model, without a seed. A sparse adapter refuses that, since its
    entries were chosen in another weight.
    """
    reset = nn.Linear.reset_parameters

    def seeded(self: nn.Linear) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            reset(self)

    with mock.patch.object(nn.Linear, "reset_parameters", seeded):
        yield
