"""Scales at inference: outputs, gradients, merging and files."""

import copy

import pytest
import torch
from peft import get_peft_model
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file
from torch import nn

import peft_ext
from peft_ext import NeuroAdaConfig


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.linear = nn.Linear(6 * 16, 8)

    def forward(self, x):
        return self.linear(torch.tanh(self.conv(x)).flatten(1))


def adapted(backend="auto", **options):
    torch.manual_seed(0)
    model = get_peft_model(
        Net(), NeuroAdaConfig(k=3, backend=backend, target_modules=["conv", "linear"], train_bias=True, **options)
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    return model.eval()


def scaled_by_hand(model, scale):
    """The same model with scaled values."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        if parameter.requires_grad:
            parameter.data *= scale
    return other


@pytest.fixture
def x():
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", ["auto", "bypass", "folded", "dense", "reference"])
def test_outputs_and_gradients_are_those_of_scaled_values(backend, x):
    model = adapted(backend)
    expected = scaled_by_hand(model, 0.25)
    peft_ext.set_scale(model, 0.25)
    results = []
    for one in (model, expected):
        y = one(x)
        y.square().sum().backward()
        results.append((y, {name: p.grad for name, p in one.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], 0.25 * gradient)


def test_zero_is_the_base_and_one_the_adapter(x):
    model = adapted()
    expected = model(x)
    with model.disable_adapter():
        base = model(x)
    peft_ext.set_scale(model, 0)
    torch.testing.assert_close(model(x), base)
    peft_ext.set_scale(model, 1.0)
    assert torch.equal(model(x), expected)


def test_rescaling_ends_with_the_block_also_after_an_error(x):
    model = adapted()
    peft_ext.set_scale(model, 0.5)
    expected = model(x)
    with pytest.raises(RuntimeError, match="on purpose"), peft_ext.rescale_adapter_scale(model, 0.5):
        torch.testing.assert_close(model(x), scaled_by_hand(adapted(), 0.25)(x))
        raise RuntimeError("on purpose")
    assert torch.equal(model(x), expected)


def test_merging_merges_the_scaled_values_and_unmerges_every_bit(x):
    model = adapted()
    before = {name: p.clone() for name, p in model.named_parameters()}
    peft_ext.set_scale(model, 0.5)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match="is merged, so its scale is fixed"):
        peft_ext.set_scale(model, 1.0)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(model.base_model.model.linear.get_delta_weight("default").ne(0).sum(), torch.tensor(24))


def test_one_of_two_adapters(x):
    model = adapted()
    model.add_adapter("second", NeuroAdaConfig(k=1, init_weights=False, target_modules=["linear"]))
    model.base_model.set_adapter(["default", "second"])
    peft_ext.set_scale(model, 0, "second")
    torch.testing.assert_close(model(x), adapted()(x))


def test_scales_are_not_saved(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "one")
    peft_ext.set_scale(model, 3.0)
    model.save_pretrained(tmp_path / "two")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_diffusers_verbs(x):
    """`scale_lora_layers` and its inverse call these on every adapted layer."""
    model = adapted()
    expected = model(x)
    layers = [module for module in model.modules() if hasattr(module, "scale_layer")]
    for layer in layers:
        layer.scale_layer(0.5)
    torch.testing.assert_close(model(x), scaled_by_hand(adapted(), 0.5)(x))
    for layer in layers:
        layer.unscale_layer(0.5)
    assert torch.equal(model(x), expected)


def test_what_is_wrong_is_named():
    model = adapted()
    with pytest.raises(ValueError, match="scale='half' must be a number"):
        peft_ext.set_scale(model, "half")
    with pytest.raises(ValueError, match="no sparse adapter 'other'"):
        peft_ext.set_scale(model, 1.0, "other")
    with pytest.raises(ValueError, match="no sparse adapters"):
        peft_ext.set_scale(nn.Linear(2, 2), 1.0)


def test_inputs_are_never_cast_so_disabling_that_changes_nothing(x):
    model = adapted()
    expected = model(x)
    with disable_input_dtype_casting(model):
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)


def test_a_mixed_model_says_which_methods_it_takes():
    """PEFT's `PeftMixedModel` makes its layers by a list of its own classes, which has no place for others."""
    with pytest.raises(ValueError, match="'NEUROADA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(Net(), NeuroAdaConfig(target_modules=["linear"]), mixed=True)
