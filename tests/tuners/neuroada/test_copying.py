"""Copies of adapted models, PEFT's low-level functions, and conversion to LoRA."""

import copy
import io
import pickle

import pytest
import torch
from peft import (
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    save_as_lora,
    set_peft_model_state_dict,
)

from peft_ext import NeuroAdaConfig
from tests.tuners.neuroada._common import (
    adapted,
    adapter_bits,
    add,
    assert_equal_bits,
    base_bits,
    fill,
    logits,
    wrapped,
)


def _through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)


@COPIES
@pytest.mark.parametrize("options", [{"k": 2}, {"selection": "random_network"}, {"backend": "folded"}], ids=str)
def test_copy_is_equal_and_independent(llama, ids, copied, options):
    model = add(adapted(llama, **options), "other", k=1)
    expected = logits(model, ids)
    twin = copied(model)
    assert torch.equal(logits(twin, ids), expected)
    fill(twin, seed=9)
    assert not torch.equal(logits(twin, ids), expected)
    assert torch.equal(logits(model, ids), expected)
    twin.set_adapter("other")
    assert model.active_adapter == "default"


@COPIES
def test_copy_trains(llama, ids, copied):
    twin = copied(adapted(llama, k=2))
    twin(ids, labels=ids).loss.backward()
    assert all(layer.deltas["default"].weight.grad.any() for layer in wrapped(twin).values())


@COPIES
def test_copy_of_a_config_is_equal(copied):
    config = NeuroAdaConfig(k=3, target_modules=["a"], modules_to_save=["b"])
    assert copied(config) == config and copied(config) is not config


# ------------------------------------------------------------------ inject_adapter_in_model and state dicts


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("options", [{"k": 2}, {"k": 2, "selection": "random", "neuron_ratio": 0.5}], ids=str)
def test_state_dict_goes_from_one_injected_model_to_another(tiny, ids, options, low_cpu_mem_usage):
    model = fill(inject_adapter_in_model(NeuroAdaConfig(**options), tiny("llama")))
    expected = logits(model, ids)
    state = get_peft_model_state_dict(model)
    assert {key.rpartition(".")[2] for key in state} - {"offsets"} == {"weight", "indices", "fingerprint"}
    other = inject_adapter_in_model(NeuroAdaConfig(**options), tiny("llama"), low_cpu_mem_usage=low_cpu_mem_usage)
    result = set_peft_model_state_dict(other, state, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "neuroada" in key]
    assert_equal_bits(adapter_bits(other), adapter_bits(model))
    assert torch.equal(logits(other, ids), expected)


def test_state_dict_of_a_peft_model(tiny, ids):
    model = adapted(tiny("llama"), k=2)
    state = get_peft_model_state_dict(model)
    other = get_peft_model(tiny("llama"), NeuroAdaConfig(k=2, selection="random")).eval()
    set_peft_model_state_dict(other, state)
    assert torch.equal(logits(other, ids), logits(model, ids))


def test_state_dict_decides_what_is_adapted(tiny, ids):
    model = fill(inject_adapter_in_model(NeuroAdaConfig(k=2, target_modules=["q_proj", "up_proj"]), tiny("llama")))
    state = get_peft_model_state_dict(model)
    config = NeuroAdaConfig(k=2, target_modules=["q_proj", "up_proj"])
    other = inject_adapter_in_model(config, tiny("llama"), state_dict=state)
    assert wrapped(other).keys() == wrapped(model).keys()
    set_peft_model_state_dict(other, state)
    assert torch.equal(logits(other, ids), logits(model, ids))


def test_whole_state_dict_restores_a_model(tiny, ids):
    """What a framework does that knows nothing of adapters: `state_dict` and `load_state_dict`."""
    model = adapted(tiny("llama"), k=2)
    other = get_peft_model(tiny("llama"), NeuroAdaConfig(k=2, selection="random")).eval()
    result = other.load_state_dict(model.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(logits(other, ids), logits(model, ids))


def test_whole_state_dict_of_another_base_is_noticed(tiny, ids):
    model = adapted(tiny("llama"), k=2)
    state = {key: value for key, value in model.state_dict().items() if "neuroada" in key}
    base = tiny("llama")
    for parameter in base.parameters():
        parameter.data.add_(1.0)
    other = get_peft_model(base, NeuroAdaConfig(k=2)).eval()
    other.load_state_dict(state, strict=False)
    with pytest.raises(ValueError, match="made for another base model"):
        logits(other, ids)


# ------------------------------------------------------------------ conversion to LoRA


def test_lora_of_full_rank_is_the_same_model(tiny, ids, tmp_path):
    model = adapted(tiny("llama"), k=2, task_type="CAUSAL_LM")
    expected, plain = logits(model, ids), logits(tiny("llama"), ids)
    save_as_lora(tmp_path, model, rank=32)
    converted = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert converted.active_peft_config.peft_type.value == "LORA"
    torch.testing.assert_close(logits(converted, ids), expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_conversion_leaves_the_model_as_it_was(llama, ids):
    model = adapted(llama, k=2)
    expected, bits = logits(model, ids), base_bits(model)
    config, state = convert_to_lora(model, rank=4)
    assert config.peft_type.value == "LORA" and state
    assert_equal_bits(base_bits(model), bits)
    assert torch.equal(logits(model, ids), expected)
