"""The adapter methods of transformers models themselves, without a `PeftModel`."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_ext import NeuroAdaConfig
from tests.tuners.neuroada._common import (
    Untouched,
    adapted,
    adapter_bits,
    assert_equal_bits,
    base_bits,
    fill,
    logits,
    wrapped,
)


OPTIONS = [
    {"k": 3},
    {"k": 2, "neuron_ratio": 0.5},
    {"selection": "magnitude_network", "k": 2},
    {"selection": "random", "seed": 5, "target_modules": ["q_proj", "down_proj"]},
    {"values_dtype": "bfloat16", "backend": "folded"},
]


@pytest.fixture
def saved(tiny, tmp_path, ids, request):
    """A folder with an adapter, and the logits that it must give."""
    options = getattr(request, "param", {"k": 3})
    model = adapted(tiny("llama"), task_type="CAUSAL_LM", **options)
    model.save_pretrained(tmp_path)
    return str(tmp_path), logits(model, ids)


def test_add_adapter_is_the_identity_and_trainable(llama, ids):
    expected = logits(llama, ids)
    llama.add_adapter(NeuroAdaConfig(k=2))
    assert torch.equal(logits(llama, ids), expected)
    trainable = {name for name, p in llama.named_parameters() if p.requires_grad}
    assert trainable and all("neuroada_delta.default.weight" in name for name in trainable)


def test_load_adapter(saved, llama, ids):
    folder, expected = saved
    llama.load_adapter(folder)
    assert torch.equal(logits(llama, ids), expected)
    assert not [n for n, p in llama.named_parameters() if p.requires_grad and "neuroada" in n]


@pytest.mark.parametrize("saved", OPTIONS, indirect=True, ids=str)
def test_from_pretrained_of_the_adapter_folder(saved, ids):
    folder, expected = saved
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder), ids), expected)


def test_load_adapter_for_training(saved, llama, ids):
    folder, expected = saved
    llama.load_adapter(folder, is_trainable=True)
    assert torch.equal(logits(llama, ids), expected)
    llama.train()(ids, labels=ids).loss.backward()
    assert all(layer.deltas["default"].weight.grad.any() for layer in wrapped(llama).values())


def test_conv1d(tiny, ids, tmp_path):
    model = adapted(tiny("gpt2"), k=3)
    model.save_pretrained(tmp_path)
    base = tiny("gpt2")
    base.load_adapter(str(tmp_path))
    assert torch.equal(logits(base, ids), logits(model, ids))


def test_base_in_half_precision(saved, tiny, ids):
    folder, expected = saved
    base = tiny("llama", torch.bfloat16)
    base.load_adapter(folder)
    torch.testing.assert_close(logits(base, ids).float(), expected, atol=0.1, rtol=0.1)


def test_switching_and_disabling(saved, llama, ids):
    folder, expected = saved
    plain = logits(llama, ids)
    llama.load_adapter(folder, adapter_name="first")
    llama.add_adapter(NeuroAdaConfig(k=1, selection="random"), adapter_name="second")
    fill(llama, "second")
    llama.set_adapter("first")
    assert llama.active_adapters() == ["first"] and torch.equal(logits(llama, ids), expected)
    llama.set_adapter("second")
    second = logits(llama, ids)
    assert not torch.equal(second, expected) and not torch.equal(second, plain)
    llama.disable_adapters()
    assert torch.equal(logits(llama, ids), plain)
    llama.enable_adapters()
    assert torch.equal(logits(llama, ids), second)


def test_loading_a_second_adapter_leaves_the_first(saved, llama, ids):
    folder, expected = saved
    llama.add_adapter(NeuroAdaConfig(k=2), adapter_name="first")
    before = adapter_bits(fill(llama, "first"), "first")
    llama.load_adapter(folder, adapter_name="second")
    assert_equal_bits(adapter_bits(llama, "first"), before)
    llama.set_adapter("second")
    assert torch.equal(logits(llama, ids), expected)


def test_delete_adapter(saved, llama, ids):
    folder, expected = saved
    plain, bits = logits(llama, ids), base_bits(llama)
    llama.load_adapter(folder, adapter_name="first")
    llama.load_adapter(folder, adapter_name="second")
    llama.delete_adapter("second")
    llama.set_adapter("first")
    assert torch.equal(logits(llama, ids), expected)
    assert not [key for key in llama.state_dict() if "second" in key]
    llama.delete_adapter("first")
    assert not [key for key in llama.state_dict() if "neuroada" in key]
    assert torch.equal(logits(llama, ids), plain)
    assert_equal_bits(base_bits(llama), bits)


def test_save_pretrained_is_read_by_peft_and_by_transformers(llama, tiny, ids, tmp_path):
    llama.add_adapter(NeuroAdaConfig(k=2))
    expected = logits(fill(llama), ids)
    llama.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path), ids), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), expected)


def test_state_dict_instead_of_a_folder(llama, tiny, ids):
    llama.add_adapter(NeuroAdaConfig(k=2))
    expected = logits(fill(llama), ids)
    base = tiny("llama")
    state = {key: value.clone() for key, value in llama.get_adapter_state_dict().items()}
    base.load_adapter(None, peft_config=NeuroAdaConfig(k=2), adapter_state_dict=state)
    assert torch.equal(logits(base, ids), expected)


def test_name_that_exists_is_refused(saved, llama):
    folder, _ = saved
    llama.load_adapter(folder)
    with pytest.raises(ValueError, match="already exists"):
        llama.load_adapter(folder)


def test_refused_adapter_leaves_the_others(llama, ids):
    llama.add_adapter(NeuroAdaConfig(k=1), adapter_name="good")
    expected = logits(fill(llama, "good"), ids)
    with Untouched(llama), pytest.raises(TypeError, match="embed_tokens"):
        llama.add_adapter(NeuroAdaConfig(target_modules=["embed_tokens"]), adapter_name="bad")
    assert set(llama.peft_config) == {"good"}
    assert torch.equal(logits(llama, ids), expected)


def test_refused_first_adapter_can_be_put_right(llama, ids):
    with Untouched(llama), pytest.raises(TypeError, match="embed_tokens"):
        llama.add_adapter(NeuroAdaConfig(target_modules=["embed_tokens"]))
    llama.add_adapter(NeuroAdaConfig(k=1))
    assert wrapped(llama)


def test_generation_through_a_pipeline_of_the_folder(saved, llama, ids):
    folder, _ = saved
    model = AutoModelForCausalLM.from_pretrained(folder)
    llama.load_adapter(folder)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), llama.generate(ids, **options))


def test_peft_model_around_is_the_same_adapter(llama, tiny, ids, tmp_path):
    """Saved by a `PeftModel`, loaded by transformers, saved again: one adapter."""
    model = fill(get_peft_model(tiny("llama"), NeuroAdaConfig(k=2)))
    model.save_pretrained(tmp_path / "peft")
    llama.load_adapter(str(tmp_path / "peft"))
    llama.save_pretrained(tmp_path / "transformers")
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "transformers")
    assert_equal_bits(adapter_bits(again), adapter_bits(model))
