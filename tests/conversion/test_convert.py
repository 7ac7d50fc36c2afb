"""Adapters of PEFT's SHiRA and Super-Tuning become ours: the same entries, outputs, gradients and merged weights."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, ShiraConfig, SupertuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_ext import convert
from peft_ext.sparse.layers import SparseLayer
from tests.contract._untouched import Untouched
from tests.conversion._common import CONFIGS, PEERS, dense_updates, peft_adapted, scaled
from tests.sparse._asserts import assert_same_bits, bits, ulps_apart
from tests.tuners.neuroada._common import logits


pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


@PEERS
def test_same_entries_and_outputs(tiny, ids, peer):
    model = peft_adapted(tiny("llama"), peer)
    expected, updates = logits(model, ids), dense_updates(model)
    converted = convert(model)
    assert converted.peft_config["default"].peft_type == "NEUROADA" and not converted.training
    torch.testing.assert_close(logits(converted, ids), expected, atol=1e-5, rtol=1e-5)
    for name, update in dense_updates(converted).items():
        assert torch.equal(update, updates.pop(name)), name
    assert not updates
    tables = {layer.deltas["default"].support.is_table for layer in _layers(converted)}
    assert tables == {peer == "SHiRA of equal rows"}


def _layers(model):
    return [module for module in model.modules() if isinstance(module, SparseLayer)]


@PEERS
def test_same_gradients(tiny, ids, peer):
    model = peft_adapted(tiny("llama"), peer)
    model(ids, labels=ids).loss.backward()
    expected = {}
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "shira_weight"):
            row, column = layer.shira_indices["default"].long()
            values = layer.shira_weight["default"]
        elif hasattr(layer, "supertuning_values"):
            flat = layer.supertuning_indices["default"].long()
            row, column = flat // layer.in_features, flat % layer.in_features
            values = layer.supertuning_values["default"]
        else:
            continue
        expected[name] = torch.zeros(layer.out_features, layer.in_features)
        expected[name][row, column] = values.grad
    converted = convert(model)
    converted(ids, labels=ids).loss.backward()
    trained = {name for name, parameter in converted.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(expected) and all("neuroada_delta" in name for name in trained)
    for name, layer in converted.get_base_model().named_modules():
        if isinstance(layer, SparseLayer):
            delta = layer.deltas["default"]
            gradient = delta.support.gather(expected[name])
            torch.testing.assert_close(delta.weight.grad, gradient, atol=1e-6, rtol=1e-4, msg=name)


@PEERS
def test_merged_weights_are_the_same_bits_and_unmerging_restores_the_base(tiny, peer):
    base = tiny("llama")
    model = peft_adapted(copy.deepcopy(base), peer)
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    converted = convert(model)
    converted.merge_adapter()
    converted.unmerge_adapter()
    for name, tensor in copy.deepcopy(converted).unload().state_dict().items():
        assert_same_bits(tensor, bits(base.state_dict()[name]))
    for name, tensor in converted.merge_and_unload().state_dict().items():
        assert_same_bits(tensor, bits(expected[name]))


@PEERS
def test_16_bit_sums_are_rounded_once(tiny, peer):
    base = tiny("llama", torch.bfloat16)
    updates = dense_updates(convert(peft_adapted(copy.deepcopy(base), peer)))
    merged = convert(peft_adapted(copy.deepcopy(base), peer)).merge_and_unload()
    theirs = peft_adapted(copy.deepcopy(base), peer).merge_and_unload()
    for name, update in updates.items():
        exact = base.get_submodule(name).weight.double() + update.double()
        assert ulps_apart(merged.get_submodule(name).weight, exact).max() <= 0.5 + 1e-3
        difference = merged.get_submodule(name).weight.double() - theirs.get_submodule(name).weight.double()
        assert difference.abs().max() <= 2.0**-7 * exact.abs().max()


def test_several_adapters(tiny, ids):
    model = peft_adapted(tiny("llama"))
    model.add_adapter("second", ShiraConfig(r=1, random_seed=9, target_modules=["o_proj"], init_weights=False))
    scaled(model)
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = logits(model, ids)
    converted = convert(model)
    assert converted.active_adapters == ["second"]
    for name in ("second", "default"):
        converted.set_adapter(name)
        torch.testing.assert_close(logits(converted, ids), expected[name], atol=1e-5, rtol=1e-5)
    converted.base_model.set_adapter(["default", "second"])
    assert converted.active_adapters == ["default", "second"]


def test_scaling_becomes_a_part_of_the_values(tiny, ids):
    model = peft_adapted(tiny("llama"))
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.3)
    expected = logits(model, ids)
    torch.testing.assert_close(logits(convert(model), ids), expected, atol=1e-5, rtol=1e-5)


@PEERS
def test_modules_trained_whole_come_along(tiny, ids, peer):
    base = tiny("llama")
    head = base.lm_head.weight.detach().clone()
    model = peft_adapted(base, peer, modules_to_save=["lm_head"], target_modules=["q_proj"])
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.add_(0.01)
    expected = logits(model, ids)
    converted = convert(model)
    torch.testing.assert_close(logits(converted, ids), expected, atol=1e-5, rtol=1e-5)
    wrapper = converted.base_model.model.lm_head
    assert torch.equal(wrapper.original_module.weight, head)
    assert wrapper.modules_to_save["default"].weight.requires_grad


def test_targets_are_the_same_modules_though_names_have_equal_ends():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)
            self.inner = nn.ModuleDict({"lin": nn.Linear(8, 8)})

        def forward(self, x):
            return self.inner["lin"](self.lin(x))

    config = ShiraConfig(r=1, target_modules="lin", init_weights=False)
    model = get_peft_model(Nested(), config).eval()
    x = torch.randn(3, 8)
    expected = model(x)
    converted = convert(model)
    torch.testing.assert_close(converted(x), expected)
    assert len(_layers(converted)) == 1


def quantised(model_dir, monkeypatch, **options):
    bnb = pytest.importorskip("bitsandbytes")
    # On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights for inference, and crashes on layers so narrow.
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)
    return AutoModelForCausalLM.from_pretrained(
        model_dir("llama"),
        quantization_config=BitsAndBytesConfig(**options),
        device_map={"": "cpu"},
        dtype=torch.float32,
    ).eval()


@pytest.mark.parametrize(
    ("bits", "tolerance"),
    # PEFT multiplies by the dequantised weight; with 8 bits that differs from the base layer's own product.
    [("load_in_4bit", 1e-4), ("load_in_8bit", 0.1)],
)
def test_quantised_base(model_dir, ids, monkeypatch, bits, tolerance):
    model = peft_adapted(quantised(model_dir, monkeypatch, **{bits: True}))
    updates, expected = dense_updates(model), logits(model, ids)
    converted = convert(model)
    for name, update in dense_updates(converted).items():
        assert torch.equal(update, updates[name]), name
    with_adapter = logits(converted, ids)
    torch.testing.assert_close(with_adapter, expected, atol=tolerance, rtol=0)
    with converted.disable_adapter():
        assert (logits(converted, ids) - with_adapter).abs().max() > 2 * tolerance


# ------------------------------------------------------------------ refused


def refused(model, error, match, *args, **kwargs):
    with Untouched(model), pytest.raises(error, match=match):
        convert(model, *args, **kwargs)


def test_merged_adapter(tiny):
    model = peft_adapted(tiny("llama"))
    model.merge_adapter()
    refused(model, ValueError, "merged.*unmerge_adapter")


def test_weights_that_modules_share(tiny):
    base = tiny("llama")
    base.model.layers[1].self_attn.q_proj.weight = base.model.layers[0].self_attn.q_proj.weight
    refused(peft_adapted(base), ValueError, "share one weight.*Untie")


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_entries_among_packed_bytes(model_dir, monkeypatch, bits):
    model = peft_adapted(quantised(model_dir, monkeypatch, **{bits: True}), "Super-Tuning")
    with pytest.raises(ValueError, match="q_proj' is quantised.*packed bytes"):
        convert(model)


def test_no_adapter_left(tiny):
    model = peft_adapted(tiny("llama"))
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="no adapter"):
        convert(model)


def test_a_layer_whose_owner_reads_its_weight():
    """Nothing is changed when the refusal comes from injecting our layers, after PEFT's are gone."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = nn.Linear(8, 8)

        def forward(self, x):
            return self.out(self.attention(x, x, x)[0])

    model = get_peft_model(
        Attention(), ShiraConfig(r=1, target_modules=["out_proj", "out"], init_weights=False)
    ).eval()
    modules, x = list(model.named_modules()), torch.randn(2, 3, 8)
    expected = model(x)
    with pytest.raises(ValueError, match="MultiheadAttention"):
        convert(model)
    assert list(model.named_modules()) == modules and torch.equal(model(x), expected)
    assert model.peft_config["default"].peft_type == "SHIRA"


def test_lost_indices(tiny):
    model = peft_adapted(tiny("llama"))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    kept = layer.shira_indices.pop("default")
    with pytest.raises(ValueError, match="no indices.*'default'"):
        convert(model)
    layer.shira_indices["default"] = kept + 1000
    with pytest.raises(ValueError, match="outside"):
        convert(model)


def _of_other_methods(tiny):
    hybrid = SupertuningConfig(sparsity=0.9, target_modules=["q_proj"], r=2, init_weights=False)
    lora = LoraConfig(target_modules=["q_proj"])
    mixed = PeftMixedModel(tiny("llama"), CONFIGS["SHiRA"]())
    return get_peft_model(tiny("llama"), hybrid), get_peft_model(tiny("llama"), lora), mixed


def test_wrong_arguments(tiny, tmp_path):
    hybrid, lora, mixed = _of_other_methods(tiny)
    refused(hybrid, ValueError, "r=2.*LoRA.*merge_and_unload")
    refused(lora, TypeError, "LORA")
    refused(mixed, TypeError, "PeftMixedModel")
    refused(tiny("llama"), TypeError, "LlamaForCausalLM, not a PeftModel")
    model = peft_adapted(tiny("llama"))
    refused(model, ValueError, "is_trainable", is_trainable=True)
    model.save_pretrained(tmp_path)
    with Untouched(model), pytest.raises(ValueError, match="PeftModel, which has adapters already"):
        convert(tmp_path, model)
    with pytest.raises(ValueError, match="base_model=None"):
        convert(str(tmp_path))
