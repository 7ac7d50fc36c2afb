"""A batch whose samples use different adapters: `adapter_names=[...]` in forward and generate."""

import copy

import pytest
import torch
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from tests.contract._common import fill, layers_of
from tests.tuners.neuroada._common import adapted, add, logits


NAMES = ["other", "__base__", "default"]


@pytest.fixture
def model(llama):
    return add(adapted(llama, k=2), "other", k=3, selection="random", target_modules=["q_proj", "down_proj"])


def one_by_one(model, call):
    """Sample i of a batch that is run with the i-th adapter alone."""
    results = []
    for i, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                results.append(call()[i])
        else:
            model.set_adapter(name)
            results.append(call()[i])
    model.set_adapter("default")
    return torch.stack(results)


def test_ragged_adapters(llama, ids):
    model = add(adapted(llama, selection="magnitude_network"), "other", neuron_ratio=0.5)
    expected = one_by_one(model, lambda: logits(model, ids))
    torch.testing.assert_close(logits(model, ids, adapter_names=NAMES), expected, atol=1e-5, rtol=1e-5)


def test_next_call_is_an_ordinary_one(model, ids):
    expected = logits(model, ids)
    logits(model, ids, adapter_names=NAMES)
    assert torch.equal(logits(model, ids), expected)
    assert not [module for module in model.modules() if module._forward_pre_hooks]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(tiny, ids, dtype):
    model = add(adapted(tiny("llama", dtype), k=2), "other", k=2)
    expected = one_by_one(model, lambda: logits(model, ids))
    mixed = logits(model, ids, adapter_names=NAMES)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed, expected, atol=2e-2, rtol=2e-2)


# Beams by argument, in a generation config, and set on the model.
BEAMS = {
    "none": {},
    "argument": {"num_beams": 3},
    "config": {"generation_config": GenerationConfig(num_beams=2, pad_token_id=0, eos_token_id=2)},
    "model": {},
}


@pytest.mark.parametrize("beams", BEAMS)
def test_generate(model, ids, beams):
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    if beams == "model":
        model.generation_config.num_beams = 2

    def generate(**kwargs):
        return model.generate(input_ids=ids, **options, **copy.deepcopy(BEAMS[beams]), **kwargs)

    expected = one_by_one(model, generate)
    mixed = generate(adapter_names=NAMES)
    assert torch.equal(mixed, expected)
    assert not torch.equal(mixed, generate())  # the adapters do differ


def test_beams_of_an_encoder_decoder(ids):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    base = T5ForConditionalGeneration(config).eval()
    model = add(adapted(base, target_modules=["q", "wo"], seed=3), "other", target_modules=["q", "wo"])
    for name in ("default", "other"):
        fill(model, name, seed=len(name), scale=2.0)
    options = {"num_beams": 2, "max_new_tokens": 5, "min_new_tokens": 5}
    expected = one_by_one(model, lambda: model.generate(input_ids=ids, **options))
    assert torch.equal(model.generate(input_ids=ids, adapter_names=NAMES, **options), expected)


# ------------------------------------------------------------------ refused


REFUSED = {
    "training": (lambda model: model.train(), NAMES, "adapter_names.*training mode"),
    "unknown": (lambda model: model, ["default", "third", "other"], "non-existing adapter.*third"),
    "number": (lambda model: model, ["default", "other"], "2 and 3"),
    "merged": (lambda model: model.merge_adapter(), NAMES, "merged.*unmerge"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_and_the_next_call_is_an_ordinary_one(model, ids, what):
    prepare, names, words = REFUSED[what]
    prepare(model)
    expected = logits(model, ids)
    with pytest.raises(ValueError, match=words):
        logits(model, ids, adapter_names=names)
    assert not [module for module in model.modules() if module._forward_pre_hooks]
    assert torch.equal(logits(model, ids), expected)


def test_disabled_adapters_give_the_base_model_as_in_peft(model, ids):
    with model.disable_adapter():
        assert torch.equal(logits(model, ids, adapter_names=NAMES), logits(model, ids))
        layer = next(iter(layers_of(model).values()))
        with pytest.raises(ValueError, match="disabled.*enable"):
            layer(torch.zeros(3, 32), adapter_names=NAMES)


def test_names_for_one_call_do_not_depend_on_the_active_adapter(model, ids):
    expected = logits(model, ids, adapter_names=NAMES)
    model.set_adapter("other")
    assert torch.equal(logits(model, ids, adapter_names=NAMES), expected)
