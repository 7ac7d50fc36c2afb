"""Merging into the base weights and back: every bit, in every dtype, in any order."""

import copy
import itertools
import pickle

import pytest
import torch
from accelerate import disk_offload
from peft import PeftModel
from torch import nn

from peft_ext.tuners.neuroada import NeuroAdaLinear
from tests.tuners.neuroada._common import (
    HALF_TYPES,
    Untouched,
    adapted,
    add,
    assert_equal_bits,
    base_bits,
    logits,
    wrapped,
)


DTYPES = [torch.float32, *HALF_TYPES]
SHAPES = [{"k": 3}, {"selection": "magnitude_network", "k": 2}, {"neuron_ratio": 0.5, "k": 2}]


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_unmerge_restores_every_bit_after_many_rounds(tiny, name, dtype, safe):
    model = adapted(tiny(name, dtype), k=3)
    bits = base_bits(model)
    for _ in range(20):
        model.merge_adapter(safe_merge=safe)
        model.unmerge_adapter()
    assert_equal_bits(base_bits(model), bits)


def test_a_model_offloaded_to_disk_merges_and_comes_back(tiny, ids, tmp_path):
    plain, model = logits(tiny("llama"), ids), adapted(tiny("llama"), k=3)
    model.save_pretrained(tmp_path)
    expected = logits(model, ids)
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    disk_offload(model, tmp_path / "offload", execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model, ids), expected)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(model.unload(), ids), plain)


@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_weight_is_the_rounded_sum(tiny, dtype, options):
    model = adapted(tiny("llama", dtype), **options)
    expected = {
        name: (layer.base_layer.weight.float() + layer.get_delta_weight("default").float()).to(dtype)
        for name, layer in wrapped(model).items()
    }
    model.merge_adapter()
    for name, layer in wrapped(model).items():
        assert torch.equal(layer.base_layer.weight, expected[name]), name


def test_zero_and_minus_zero_weights_come_back_as_they_were(llama):
    weight = llama.model.layers[0].mlp.up_proj.weight.data
    weight[:, ::2], weight[:, 1::2] = -0.0, 0.0
    model = adapted(llama, k=5)
    bits = base_bits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_equal_bits(base_bits(model), bits)


@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_merged_model_gives_the_same_output(tiny, inputs_of, name, options):
    model, inputs = adapted(tiny(name), **options), inputs_of(name)
    with torch.no_grad():
        expected = model(**inputs).logits
        model.merge_adapter()
        assert not torch.equal(model(**inputs).logits, torch.zeros_like(expected))
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adapters_leave_in_any_order(tiny, dtype):
    """Both adapters rank by magnitude, so their entries overlap and one is merged over the other."""
    model = add(add(adapted(tiny("llama", dtype), k=2), "b", k=3, seed=2), "c", k=1, seed=3)
    bits = base_bits(model)
    names = ["default", "b", "c"]
    for first, second, third in itertools.permutations(names):
        model.merge_adapter(names)
        for layer in wrapped(model).values():
            layer.unmerge([first])
            assert layer.merged_adapters == [name for name in names if name != first]
            layer.unmerge([second])
            layer.unmerge([third])
            assert layer.merged_adapters == []
        assert_equal_bits(base_bits(model), bits)


def test_what_stays_merged_is_as_if_merged_alone(llama, ids):
    model = add(adapted(llama, k=2), "b", k=3)
    model.merge_adapter(["b"])
    expected = base_bits(model)
    model.unmerge_adapter()
    model.merge_adapter(["default", "b"])
    for layer in wrapped(model).values():
        layer.unmerge(["default"])
    assert_equal_bits(base_bits(model), expected)


def test_merging_twice_and_unmerging_twice_warn_and_change_nothing(llama):
    model = adapted(llama, k=1)
    model.merge_adapter()
    bits = base_bits(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert_equal_bits(base_bits(model), bits)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        wrapped(model)["base_model.model.model.layers.0.mlp.up_proj"].unmerge()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_of_a_broken_adapter_writes_nothing(llama, value):
    model = add(adapted(llama, k=2), "broken", k=2)
    layer = wrapped(model)["base_model.model.model.layers.0.self_attn.q_proj"]
    layer.deltas["broken"].weight.data[3, 1] = value
    with Untouched(model), pytest.raises(ValueError, match="NaNs detected.*broken"):
        layer.merge(safe_merge=True, adapter_names=["default", "broken"])
    assert layer.merged_adapters == [] and not layer.merged


def test_safe_merge_of_a_model_with_one_broken_layer(llama):
    model = adapted(llama, k=2)
    layer = wrapped(model)["base_model.model.model.layers.1.mlp.down_proj"]
    layer.deltas["default"].weight.data[0, 0] = float("nan")
    bits = base_bits(model)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    assert_equal_bits(base_bits(model), bits)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_merge_and_unload_gives_a_plain_model(tiny, inputs_of, name, safe):
    base, inputs = tiny(name), inputs_of(name)
    kinds = {path: type(module) for path, module in base.named_modules()}
    model = adapted(base, k=2)
    with torch.no_grad():
        expected = model(**inputs).logits
        merged = model.merge_and_unload(safe_merge=safe)
        assert {path: type(module) for path, module in merged.named_modules()} == kinds
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert not hasattr(merged, "peft_config")


def test_merge_and_unload_chosen_adapters(llama, ids):
    model = add(adapted(llama, k=2), "b", k=3)
    model.set_adapter("b")
    expected = logits(model, ids)
    merged = model.merge_and_unload(adapter_names=["b"])
    torch.testing.assert_close(logits(merged, ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_unload_gives_the_base_model_back(llama, ids, merged):
    expected, bits = logits(llama, ids), base_bits(llama)
    model = adapted(llama, k=2)
    if merged:
        model.merge_adapter()
        model.unmerge_adapter()
    plain = model.unload()
    assert_equal_bits(base_bits(plain), bits)
    assert torch.equal(logits(plain, ids), expected)
    assert not [name for name, module in plain.named_modules() if isinstance(module, NeuroAdaLinear)]


def test_merged_model_saves_as_an_ordinary_one(llama, ids, tmp_path):
    from transformers import AutoModelForCausalLM

    merged = adapted(llama, k=2).merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(merged, ids))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_of_a_merged_model_can_be_unmerged(llama, copied):
    model = adapted(llama, k=2)
    bits = base_bits(model)
    model.merge_adapter()
    twin = copied(model)
    twin.unmerge_adapter()
    assert_equal_bits(base_bits(twin), bits)
    assert model.base_model.model.model.layers[0].mlp.up_proj.merged  # the other one is a model of its own


def test_merged_model_can_be_cast_and_moved_before_unmerging(llama):
    model = adapted(llama, k=2)
    expected = base_bits(copy.deepcopy(model).to(torch.float64))
    model.merge_adapter()
    model.to(torch.float64)
    model.unmerge_adapter()
    assert_equal_bits(base_bits(model), expected)


def test_disabled_forward_unmerges(llama, ids):
    expected, bits = logits(llama, ids), base_bits(llama)
    model = adapted(llama, k=2)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), expected)
    assert_equal_bits(base_bits(model), bits)


def test_saving_while_merged_saves_the_same_adapter(llama, tmp_path, ids):
    from safetensors.torch import load_file

    model = adapted(llama, k=2)
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    before, merged = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "merged"))
    assert_equal_bits(merged, before)


def test_delta_weight_is_dense_and_in_the_base_layers_shape(tiny):
    for name in ("llama", "gpt2"):
        for layer in wrapped(adapted(tiny(name), k=2)).values():
            delta = layer.get_delta_weight("default")
            assert delta.shape == layer.base_layer.weight.shape
            assert int((delta != 0).sum()) == layer.out_features * 2


def test_layer_without_the_adapter_is_left_alone():
    from peft import get_peft_model

    from peft_ext import NeuroAdaConfig

    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), NeuroAdaConfig(target_modules=["0"]))
    model.add_adapter("other", NeuroAdaConfig(target_modules=["1"], init_weights=False))
    layer = model.base_model.model[1]
    model.merge_adapter(["other"])
    assert model.base_model.model[0].merged_adapters == [] and layer.merged_adapters == ["other"]
