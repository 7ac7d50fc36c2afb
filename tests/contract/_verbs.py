"""What users do with adapters, each a function of a case that checks the outcome."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor

from peft_ext import hotswap_adapter, rescale_adapter_scale
from tests.contract._case import Case, close, trained
from tests.contract._common import adapters_of, add, assert_equal_bits, base_bits, fill, layers_of


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def assert_learns(case: Case, model: Any, adapters: list[str]) -> None:
    found = model(**case.inputs)
    (found if isinstance(found, Tensor) else found.logits).square().sum().backward()
    for layer in layers_of(model).values():
        for name in adapters:
            values = [p for p in adapters_of(layer)[name].parameters() if p.numel()]
            assert all(p.grad is not None and p.grad.any() for p in values)


# ---------------------------------------------------------------------- one adapter


def start(case: Case) -> None:
    """A new adapter changes no bit of the output."""
    model = get_peft_model(case.base(), case.config()).eval()
    assert torch.equal(case.logits(model), case.logits(case.base()))


def save_and_load(case: Case) -> None:
    model = case.adapted()
    expected = case.logits(model)
    model.save_pretrained(case.folder / "first")
    for low in (False, True):
        loaded = PeftModel.from_pretrained(case.base(), case.folder / "first", low_cpu_mem_usage=low)
        assert not loaded.training and not trained(loaded)
        assert torch.equal(case.logits(loaded), expected)
    continued = PeftModel.from_pretrained(case.base(), case.folder / "first", is_trainable=True)
    assert trained(continued) == trained(model)
    loaded.save_pretrained(case.folder / "second")
    first, second = (load_file(case.folder / name / WEIGHTS) for name in ("first", "second"))
    assert_equal_bits(second, first)


def several_folders(case: Case) -> None:
    size = {"mores": {"rank": 3}, "psn by density": {"density": 0.5}}.get(case.method, {"k": 3})
    model, expected = case.two(**size), {}
    for name in ("other", "default"):
        model.set_adapter(name)
        expected[name] = case.logits(model)
    model.save_pretrained(case.folder)
    for low in ({"low_cpu_mem_usage": False}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(case.base(), case.folder, adapter_name="renamed", **low)
        loaded.load_adapter(case.folder / "other", "second", **low)
        loaded.load_adapter(case.folder, "third", subfolder="other", **low)
        assert loaded.active_adapters == ["renamed"]
        for name, saved in (("renamed", "default"), ("second", "other"), ("third", "other")):
            loaded.set_adapter(name)
            assert torch.equal(case.logits(loaded), expected[saved])
        alone = PeftModel.from_pretrained(case.base(), str(case.folder), subfolder="other", **low)
        assert torch.equal(case.logits(alone), expected["other"])
    loaded.save_pretrained(case.folder / "again", selected_adapters=["renamed"])
    assert [path.name for path in (case.folder / "again").iterdir() if path.is_dir()] == ["renamed"]
    assert (case.folder / "again" / "renamed" / CONFIG).read_bytes() == (case.folder / CONFIG).read_bytes()


def state_dicts(case: Case) -> None:
    """Of PEFT, of a model without a `PeftModel`, and whole ones, into adapters that have other entries."""
    is_even = "network" not in case.method  # else an empty adapter does not know its sizes
    others = {"selection": "random"} if case.is_sparse and is_even else {}
    model = case.adapted()
    expected = case.logits(model)
    for state, load in (
        (get_peft_model_state_dict(model), set_peft_model_state_dict),
        (model.state_dict(), lambda other, state: other.load_state_dict(state)),
    ):
        other = get_peft_model(case.base(), case.config(**others)).eval()
        load(other, state)
        assert torch.equal(case.logits(other), expected)
    model = fill(inject_adapter_in_model(case.config(), case.base()).eval())
    state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    for options in ({}, {"state_dict": state}, *([{"low_cpu_mem_usage": True}] if is_even else [])):
        other = inject_adapter_in_model(case.config(**others), case.base(), **options).eval()
        assert layers_of(other).keys() == layers_of(model).keys()
        result = set_peft_model_state_dict(other, state, low_cpu_mem_usage=options.get("low_cpu_mem_usage", False))
        assert not result.unexpected_keys and not set(result.missing_keys) & state.keys()
        assert torch.equal(case.logits(other), case.logits(model))


def copies(case: Case) -> None:
    model = case.two()
    expected = case.logits(model)

    def through_torch(model: Any) -> Any:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)

    for copied in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch):
        assert copied(case.config()) == case.config()
        twin = copied(model)
        assert torch.equal(case.logits(twin), expected)
        assert_learns(case, twin, ["default"])
        fill(twin, seed=9)
        assert not torch.equal(case.logits(twin), expected)
        twin.set_adapter("other")
        twin.unload()
        assert model.active_adapter == "default" and torch.equal(case.logits(model), expected)


def merge(case: Case) -> None:
    model = case.adapted()
    bits, expected = base_bits(model), case.logits(model)
    for _ in range(3):
        model.merge_adapter(safe_merge=True)
        close(case.logits(model), expected)
        model.unmerge_adapter()
        assert_equal_bits(base_bits(model), bits)
        assert torch.equal(case.logits(model), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(case.logits(model), case.logits(case.base()))
    assert_equal_bits(base_bits(model), bits)


def merge_and_unload(case: Case) -> None:
    kinds = {path: type(module) for path, module in case.base().named_modules()}
    model = case.adapted()
    expected = case.logits(model)
    merged = model.merge_and_unload()
    assert {path: type(module) for path, module in merged.named_modules()} == kinds
    assert not hasattr(merged, "peft_config") and not [n for n in merged.state_dict() if "_delta" in n]
    close(case.logits(merged), expected)


def scale(case: Case) -> None:
    model = case.adapted()
    with rescale_adapter_scale(model, 0.0):
        close(case.logits(model), case.logits(case.base()))


# ---------------------------------------------------------------------- several adapters


def switch(case: Case) -> None:
    model = case.adapted()
    first = case.logits(model)
    add(model, "other", case.method, **case.options)
    assert torch.equal(case.logits(model), first)
    model.set_adapter("other")
    assert not torch.equal(case.logits(model), first)
    for active in ("other", "default"):
        model.set_adapter(active)
        assert trained(model) and all(f".{active}." in name for name in trained(model))
    assert torch.equal(case.logits(model), first)
    status = model.get_model_status()
    assert status.available_adapters == ["default", "other"] and status.active_adapters == ["default"]
    assert status.requires_grad == {"default": True, "other": False}
    assert status.num_adapter_layers >= len(layers_of(model)) and status.merged_adapters == []
    kinds = {layer.module_type.partition(".")[0] for layer in model.get_layer_status()}
    assert case.config().peft_type.value.lower() in kinds
    model.set_adapter("default", inference_mode=True)
    assert not trained(model)


def disable(case: Case) -> None:
    model, expected = case.adapted(), case.logits(case.base())
    steered = case.logits(model)
    with model.disable_adapter():
        assert torch.equal(case.logits(model), expected)
    assert torch.equal(case.logits(model), steered)
    model.base_model.disable_adapter_layers()
    assert torch.equal(case.logits(model), expected) and model.get_model_status().enabled is False
    model.base_model.enable_adapter_layers()
    assert torch.equal(case.logits(model), steered) and model.get_model_status().enabled is True


def delete(case: Case) -> None:
    model = case.two()
    model.set_adapter("other")
    expected = case.logits(model)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert set(model.peft_config) == {"other"} and model.active_adapters == ["other"]
    assert not [key for key in model.state_dict() if ".default." in key]
    assert torch.equal(case.logits(model), expected)
    with pytest.raises(ValueError, match="default does not exist"):
        model.delete_adapter("default")
    add(model, "default", case.method, **case.options)  # the name is free
    plain = model.unload()
    assert_equal_bits(base_bits(plain), base_bits(case.base()))
    assert torch.equal(case.logits(plain), case.logits(case.base())) and not layers_of(plain)


def mixed_batch(case: Case) -> None:
    model, names = case.two(), ["other", "__base__", "default"]
    expected = [None, case.logits(case.base())[1], case.logits(model)[2]]
    model.set_adapter("other")
    expected[0] = case.logits(model)[0]
    close(case.logits(model, adapter_names=names), torch.stack(expected))


def two_active(case: Case) -> None:
    """They add up, train together, and merge to the same."""
    model = case.two()
    bits = base_bits(model)
    model.base_model.set_adapter(["default", "other"])
    expected = case.logits(model)
    assert_learns(case, model, ["default", "other"])
    model.merge_adapter()
    close(case.logits(model), expected)
    with pytest.raises(ValueError, match=r"\['other'\] while they are merged"):
        model.delete_adapter("other")
    model.base_model.unmerge_adapter()
    assert_equal_bits(base_bits(model), bits)


def weighted(case: Case) -> None:
    model = case.two()
    expected = case.logits(model)
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "both", combination_type="linear")
    for layer in layers_of(model).values():
        total = 0.5 * layer.get_delta_weight("default") - 2.0 * layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("both"), total)
        first, second, both = (layer.deltas[name].bias for name in ("default", "other", "both"))
        assert (both is None) == (first is None)
        if both is not None:
            torch.testing.assert_close(both, 0.5 * first - 2.0 * second)
    assert model.active_adapters == ["default"] and not [name for name in trained(model) if ".both." in name]
    assert torch.equal(case.logits(model), expected)
    model.add_weighted_adapter(["default"], [1.0], "copy")
    model.set_adapter("copy")
    assert torch.equal(case.logits(model), expected)


def hot_swap(case: Case) -> None:
    other = case.adapted(seed=7)
    other.save_pretrained(case.folder)
    model = case.adapted(seed=1)
    kept = {name: p.data_ptr() for name, p in model.named_parameters()}
    hotswap_adapter(model, case.folder)
    assert torch.equal(case.logits(model), case.logits(other))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == kept
