"""A batch whose samples use different adapters: `adapter_names=[...]` in forward and generate."""

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from tests.tuners.neuroada._common import adapted, add, fill, logits, wrapped


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


@pytest.mark.parametrize("beams", [1, 3])
def test_generate(model, ids, beams):
    def generate(**kwargs):
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **kwargs)

    options = {"num_beams": beams, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = one_by_one(model, generate)
    mixed = generate(adapter_names=NAMES)
    assert torch.equal(mixed, expected)
    assert not torch.equal(mixed, generate())  # the adapters do differ


def test_beams_given_in_a_generation_config(model, ids):
    from transformers import GenerationConfig

    config = GenerationConfig(num_beams=2, max_new_tokens=4, min_new_tokens=4, pad_token_id=0, eos_token_id=2)

    def generate(**kwargs):
        mask = torch.ones_like(ids)
        return model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **kwargs)

    expected = one_by_one(model, generate)
    assert torch.equal(generate(adapter_names=NAMES), expected)


def test_beams_set_on_the_model(model, ids):
    model.generation_config.num_beams = 2
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "min_new_tokens": 4}
    expected = one_by_one(model, lambda: model.generate(input_ids=ids, **options))
    assert torch.equal(model.generate(input_ids=ids, adapter_names=NAMES, **options), expected)


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


def test_training_is_refused(model, ids):
    with pytest.raises(ValueError, match="adapter_names.*training mode"):
        logits(model.train(), ids, adapter_names=NAMES)


def test_unknown_adapter_is_refused(model, ids):
    with pytest.raises(ValueError, match="non-existing adapter.*third"):
        logits(model, ids, adapter_names=["default", "third", "other"])


def test_wrong_number_of_names_is_refused(model, ids):
    with pytest.raises(ValueError, match="2 and 3"):
        logits(model, ids, adapter_names=["default", "other"])


def test_merged_adapters_are_refused(model, ids):
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged.*unmerge"):
        logits(model, ids, adapter_names=NAMES)


def test_disabled_adapters_give_the_base_model_as_in_peft(model, ids):
    with model.disable_adapter():
        assert torch.equal(logits(model, ids, adapter_names=NAMES), logits(model, ids))
        layer = next(iter(wrapped(model).values()))
        with pytest.raises(ValueError, match="disabled.*enable"):
            layer(torch.zeros(3, 32), adapter_names=NAMES)


def test_refused_call_leaves_no_hook(model, ids):
    expected = logits(model, ids)
    with pytest.raises(ValueError):
        logits(model, ids, adapter_names=["default"])
    assert not [module for module in model.modules() if module._forward_pre_hooks]
    assert torch.equal(logits(model, ids), expected)


def test_names_for_one_call_do_not_depend_on_the_active_adapter(model, ids):
    expected = logits(model, ids, adapter_names=NAMES)
    model.set_adapter("other")
    assert torch.equal(logits(model, ids, adapter_names=NAMES), expected)
