"""Bases that diffusers stores in 8-bit floats and casts for each call, before they are adapted or after."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_ext import NeuroAdaConfig, gradient_scores

from ._asserts import assert_same_bits, assert_same_support, bits, with_dense_updates


hooks = pytest.importorskip("diffusers.hooks")

STORAGE = [torch.float8_e4m3fn, torch.float8_e5m2]


class Blocks(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down, self.conv = nn.Linear(16, 32), nn.Linear(32, 8), nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x):
        hidden = self.down(torch.relu(self.up(x)))  # [samples, 8]
        return self.conv(hidden[:, :, None]).flatten(1)


def cast(model, storage):
    hooks.apply_layerwise_casting(model, storage, torch.bfloat16)
    return model


def adapt(model, **options):
    options = {"k": 2, "init_weights": False, "target_modules": ["up", "down", "conv"], **options}
    return get_peft_model(model, NeuroAdaConfig(**options))


def x():
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).bfloat16()


def base(seed=0):
    return Blocks(seed).bfloat16()


@pytest.mark.parametrize("train_bias", [False, True])
@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("cast_first", [True, False])
def test_a_cast_base_trains_and_computes_as_the_dense_update_says(cast_first, storage, train_bias):
    adapted = (
        adapt(cast(base(), storage), train_bias=train_bias) if cast_first else adapt(base(), train_bias=train_bias)
    )
    model = adapted if cast_first else cast(adapted, storage)
    layers = {name: model.base_model.model.get_submodule(name) for name in ("up", "down", "conv")}
    dense = cast(base(), storage).float()
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    for name, layer in layers.items():
        assert layer.base_layer.weight.dtype == storage
        dense.get_submodule(name).__dict__.pop("forward", None)  # diffusers' hook
    dense = with_dense_updates(model, dense)
    torch.testing.assert_close(model(x()).float(), dense(x().float()), atol=0.05, rtol=0.05)
    before = {name: bits(layer.base_layer.weight) for name, layer in layers.items()}
    model(x()).float().square().sum().backward()
    for name, layer in layers.items():
        assert layer.deltas["default"].weight.grad.any()
        assert_same_bits(layer.base_layer.weight, before[name])


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("selection", ["magnitude", "magnitude_layer", "random", "reverse_network"])
def test_entries_are_those_of_the_rounded_weights(storage, selection):
    """As if the weights had been rounded and were stored in more bits."""
    rounded = cast(base(), storage)
    for name in ("up", "down", "conv"):
        module = rounded.get_submodule(name)
        del module.forward
        module.float()
    ours = adapt(cast(base(), storage), selection=selection).base_model.model
    theirs = adapt(rounded, selection=selection).base_model.model
    for name in ("up", "down", "conv"):
        layer, other = ours.get_submodule(name), theirs.get_submodule(name)
        assert_same_support(layer.deltas["default"].support, other.deltas["default"].support)


@pytest.mark.parametrize("made_on", ["cast", "as it was"])
@pytest.mark.parametrize("load_onto", ["cast", "as it was", "cast afterwards"])
@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_files_go_from_one_precision_to_the_other(made_on, load_onto, storage, tmp_path):
    model = adapt(cast(base(), storage) if made_on == "cast" else base())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(cast(base(), storage) if load_onto == "cast" else base(), tmp_path)
    loaded = cast(loaded, storage) if load_onto == "cast afterwards" else loaded
    torch.testing.assert_close(loaded(x()).float(), model(x()).float(), atol=0.3, rtol=0.3)
    other = base(seed=2)
    with pytest.raises(ValueError, match="another base model"):
        PeftModel.from_pretrained(cast(other, storage) if load_onto == "cast" else other, tmp_path)


def test_what_8_bits_can_not_hold_is_refused_with_words():
    model = adapt(cast(base(), torch.float8_e4m3fn))
    before = bits(model.base_model.model.up.base_layer.weight)
    with pytest.raises(ValueError, match="float8_e4m3fn, too coarse.*merge there, and cast afterwards"):
        model.merge_adapter()
    assert_same_bits(model.base_model.model.up.base_layer.weight, before)
    with pytest.raises(TypeError, match="Score the unquantised model"):
        gradient_scores(cast(base(), torch.float8_e4m3fn), [(x(), torch.zeros(5))], features="down", progress=False)


def test_merged_before_the_cast_comes_out_again():
    model = adapt(base())
    expected = cast(copy.deepcopy(model).unload(), torch.float8_e4m3fn)(x())
    model.merge_adapter()
    cast(model, torch.float8_e4m3fn)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x()), expected)
