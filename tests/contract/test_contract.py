"""PEFT's verbs for every method, with trained biases and heads where the method has them."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_ext import hotswap_adapter
from tests.contract._common import (
    ALL_METHODS,
    METHODS,
    adapted,
    add,
    assert_equal_bits,
    base_bits,
    layers_of,
    logits,
)


EVERY = pytest.mark.parametrize("method", METHODS)
NAMES = ["llama", "gpt2", "bert", "vit"]
# Steering looks for a decoder; the others adapt layers.
EVERYWHERE = pytest.mark.parametrize(
    ("method", "name"), [*((method, name) for method in METHODS for name in NAMES), ("mores", "llama")]
)


@EVERYWHERE
def test_starts_as_the_base_model(tiny, inputs_of, method, name):
    expected = logits(tiny(name), inputs_of(name))
    model = get_peft_model(tiny(name), ALL_METHODS[method]()).eval()
    torch.testing.assert_close(logits(model, inputs_of(name)), expected, rtol=0, atol=0)


@EVERY
@pytest.mark.parametrize("name", NAMES)
def test_merge_agrees_and_unmerge_restores_every_bit(tiny, inputs_of, method, name):
    kinds = {path: type(module) for path, module in tiny(name).named_modules()}
    model = adapted(tiny(name), method)
    inputs, bits = inputs_of(name), base_bits(model)
    expected = logits(model, inputs)
    for _ in range(3):
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(logits(model, inputs), expected, atol=1e-4, rtol=1e-4)
        model.unmerge_adapter()
        assert_equal_bits(base_bits(model), bits)
        assert torch.equal(logits(model, inputs), expected)
    merged = model.merge_and_unload()
    assert {path: type(module) for path, module in merged.named_modules()} == kinds
    assert not hasattr(merged, "peft_config") and not [n for n in merged.state_dict() if "_delta" in n]
    torch.testing.assert_close(logits(merged, inputs), expected, atol=1e-4, rtol=1e-4)


@EVERY
def test_safe_merge_refuses_what_is_not_finite(tiny, method):
    model = adapted(tiny("bert"), method)
    last = list(layers_of(model).values())[-1].deltas["default"]
    bits = base_bits(model)
    for parameter in last.parameters():
        before = parameter.detach().clone()
        parameter.data[0] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            model.merge_adapter(safe_merge=True)
        model.unmerge_adapter()
        assert_equal_bits(base_bits(model), bits)
        parameter.data.copy_(before)


@pytest.mark.parametrize(("method", "name"), [*((method, "gpt2") for method in METHODS), ("mores", "llama")])
def test_adapters_are_switched_disabled_and_deleted(tiny, ids, method, name):
    inputs = {"input_ids": ids}
    expected = logits(tiny(name), inputs)
    model = adapted(tiny(name), method)
    first = logits(model, inputs)
    add(model, "other", method)
    assert torch.equal(logits(model, inputs), first)
    model.set_adapter("other")
    second = logits(model, inputs)
    assert not torch.equal(first, second)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)
    names = ["other", "__base__", "default"]
    if method in METHODS:
        mixed = logits(model, inputs, adapter_names=names)
        torch.testing.assert_close(mixed, torch.stack([second[0], expected[1], first[2]]), atol=1e-5, rtol=1e-5)
    else:
        with pytest.raises(ValueError, match="adapter_names"):
            logits(model, inputs, adapter_names=names)
    for active in ("other", "default"):
        model.set_adapter(active)
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trainable and all(f".{active}." in n for n in trainable)
    model.delete_adapter("other")
    assert not [key for key in model.state_dict() if ".other." in key]
    assert torch.equal(logits(model, inputs), first)
    plain = model.unload()
    assert_equal_bits(base_bits(plain), base_bits(tiny(name)))
    assert torch.equal(logits(plain, inputs), expected) and not layers_of(plain)


@EVERY
def test_two_active_adapters_merge_to_the_same(tiny, ids, method):
    inputs = {"input_ids": ids}
    model = add(adapted(tiny("gpt2"), method), "other", method)
    bits = base_bits(model)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-4, rtol=1e-4)
    model.base_model.unmerge_adapter()
    assert_equal_bits(base_bits(model), bits)


@EVERY
def test_weighted_combination_is_the_weighted_sum(tiny, method):
    model = add(adapted(tiny("gpt2"), method), "other", method)
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "both", combination_type="linear")
    for layer in layers_of(model).values():
        expected = 0.5 * layer.get_delta_weight("default") - 2.0 * layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("both"), expected)
        first, second, both = (layer.deltas[name].bias for name in ("default", "other", "both"))
        assert (both is None) == (first is None)
        if both is not None:
            torch.testing.assert_close(both, 0.5 * first - 2.0 * second)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "gps over the network"])
def test_hotswap_puts_the_other_adapter_in_place(tiny, ids, tmp_path, method):
    inputs = {"input_ids": ids}
    other = adapted(tiny("gpt2"), method, seed=7)
    other.save_pretrained(tmp_path)
    model = adapted(tiny("gpt2"), method, seed=1)
    kept = {name: p.data_ptr() for name, p in model.named_parameters()}
    hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model, inputs), logits(other, inputs))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EVERY
def test_half_precision_base(tiny, inputs_of, tmp_path, method, dtype):
    model = adapted(tiny("vit", dtype), method)
    inputs = inputs_of("vit", dtype)
    expected = logits(model, inputs)
    assert expected.dtype == dtype
    assert {p.dtype for layer in layers_of(model).values() for p in layer.deltas.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("vit", dtype), tmp_path), inputs), expected)
    bits = base_bits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_equal_bits(base_bits(model), bits)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("method", ["gps", "neuroada with biases"])
def test_attention_with_trained_biases_merges_and_unmerges(method):
    torch.manual_seed(0)
    model = adapted(Attending(), method, target_modules=["attention"])
    nn.init.normal_(model.get_submodule("base_model.model.attention.base_layer").in_proj_bias)
    bits, x = base_bits(model), torch.randn(2, 5, 8)
    projections = layers_of(model)
    assert len(projections) == 4 and all(layer.deltas["default"].bias is not None for layer in projections.values())
    with torch.no_grad():
        expected = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        model.unmerge_adapter()
        assert_equal_bits(base_bits(model), bits)
        assert torch.equal(model(x), expected)


def test_shared_weights_with_biases_of_their_own_are_refused():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base[1].weight = base[0].weight
    with pytest.raises(ValueError, match="share a weight(.|\n)*train_bias=False"):
        get_peft_model(base, METHODS["gps"](target_modules=["0", "1"]))
    assert not layers_of(base)
    get_peft_model(base, METHODS["gps"](target_modules=["0", "1"], train_bias=False))


@pytest.mark.parametrize("requantize", [False, True])
def test_quantised_layer_with_trained_biases(requantize):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 32))
    quantised = bnb.nn.Linear4bit(64, 32, quant_type="nf4")
    quantised.load_state_dict(base[0].state_dict())
    base[0] = quantised.to("cpu")
    base.is_loaded_in_4bit = True
    model = adapted(base, "neuroada with biases", target_modules=["0"])
    layer = next(iter(layers_of(model).values()))
    bias = layer.get_base_layer().bias.detach().clone()
    layer.requantize = requantize
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = model(x)
        model.merge_adapter()
        assert torch.equal(layer.get_base_layer().bias, bias + layer.deltas["default"].bias)
        if not requantize:
            torch.testing.assert_close(model(x), expected, atol=1e-2, rtol=1e-2)
        model.unmerge_adapter()
        assert torch.equal(layer.get_base_layer().bias, bias)
        assert torch.equal(model(x), expected)


@EVERY
def test_an_adapter_made_with_the_config_of_another_has_its_entries(tiny, ids, tmp_path, method):
    """As TRL makes the reference of a policy: from its config, and then its values copied by name."""
    inputs = {"input_ids": ids}
    adapted(tiny("llama"), method).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    for layer in layers_of(model).values():  # now magnitudes rank otherwise
        layer.get_base_layer().weight.data = layer.get_base_layer().weight.data.flip(-1)
        layer.deltas["default"].checked = True
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    for layer in layers_of(model).values():
        ours, theirs = (layer.deltas[adapter].support for adapter in ("default", "ref"))
        assert torch.equal(ours.indices, theirs.indices) and ours.indices.data_ptr() != theirs.indices.data_ptr()
    expected = logits(model, inputs)
    model.set_adapter("ref")
    assert torch.equal(logits(model, inputs), expected)
