"""Saving and loading: the loaded model gives the same output bit for bit, from a file as small as it can be."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from tests.contract._common import adapter_bits, assert_equal_bits, layers_of
from tests.tuners.neuroada._common import HALF_TYPES, adapted, logits


WEIGHTS = "adapter_model.safetensors"
LOW = pytest.mark.parametrize("low_cpu_mem_usage", [False, True])


@LOW
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": r".*\.1\..*proj", "k": 4},
        {"target_modules": ["up_proj"], "layers_to_transform": [0]},
        {"exclude_modules": ["down_proj"], "backend": "folded"},
        {"backend": "dense", "values_dtype": "bfloat16"},
        {"k": 1000},
        {"init_weights": False},
        {"trainable_token_indices": [5, 6], "target_modules": ["v_proj"]},
    ],
    ids=str,
)
def test_reload_with_options(tiny, ids, tmp_path, options, low_cpu_mem_usage):
    model = adapted(tiny("llama"), **options)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert_equal_bits(adapter_bits(loaded), adapter_bits(model))
    assert loaded.peft_config["default"].backend == options.get("backend", "auto")


def test_reload_onto_a_16_bit_base_rounds_no_value(tiny, tmp_path):
    model = adapted(tiny("llama", torch.bfloat16), target_modules=["q_proj"])
    assert layers_of(model).popitem()[1].deltas["default"].weight.dtype == torch.float32
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama", torch.bfloat16), tmp_path, low_cpu_mem_usage=True)
    assert_equal_bits(adapter_bits(loaded), adapter_bits(model))


@LOW
@pytest.mark.parametrize("bias", ["all", "neuroada_only"])
def test_reload_with_biases_and_a_head(tiny, inputs_of, tmp_path, bias, low_cpu_mem_usage):
    inputs = inputs_of("bert")
    config = {"target_modules": ["query"], "bias": bias, "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    model = adapted(tiny("bert"), **config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("bert"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_pickle_file(tiny, ids, tmp_path):
    model = adapted(tiny("llama"), k=2)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / WEIGHTS).exists()
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path), ids), logits(model, ids))


# ------------------------------------------------------------------ what is in the file


def test_file_holds_values_indices_and_fingerprints_only(tiny, tmp_path):
    model = adapted(tiny("llama"), k=2)
    model.save_pretrained(tmp_path)
    prefixes = {f"{name}.neuroada_delta" for name in layers_of(model)}
    expected = {f"{prefix}.{part}" for prefix in prefixes for part in ("weight", "indices", "fingerprint")}
    assert load_file(tmp_path / WEIGHTS).keys() == expected
    assert all(key.startswith("base_model.model.model.layers.") for key in expected)


@LOW
@pytest.mark.parametrize(
    ("fan_in", "dtype"),
    [(256, torch.uint8), (257, torch.uint16), (65536, torch.uint16), (65537, torch.int32)],
)
def test_last_index_of_every_width_survives(tmp_path, fan_in, dtype, low_cpu_mem_usage):
    def base():
        model = nn.Sequential(nn.Linear(fan_in, 2, bias=False))
        model[0].weight.data.zero_()[:, -1] = 1.0
        return model.eval()

    model = adapted(base(), k=1, target_modules=["0"])
    assert layers_of(model)["base_model.model.0"].deltas["default"].indices.tolist() == [[fan_in - 1]] * 2
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS)["base_model.model.0.neuroada_delta.indices"].dtype == dtype
    loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_equal_bits(adapter_bits(loaded), adapter_bits(model))
    x = torch.randn(3, fan_in)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


# ------------------------------------------------------------------ how it is loaded


@LOW
def test_loaded_adapter_can_be_trained_on(tiny, ids, tmp_path, low_cpu_mem_usage):
    model = adapted(tiny("llama"), k=2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    losses = []
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2) for m in (model, loaded)]
    for _ in range(3):
        for m, optimizer in zip((model, loaded), optimizers, strict=True):
            loss = m(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[::2] == losses[1::2] and losses[-1] < losses[0]


def test_task_type_of_a_model_without_one_is_found_by_its_class(tiny, ids, tmp_path):
    from peft import AutoPeftModel

    model = adapted(tiny("llama"), k=2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoPeftModel.from_pretrained(tmp_path), ids), logits(model, ids))


# ------------------------------------------------------------------ onto which base


@LOW
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_cast_base_is_accepted(tiny, ids, tmp_path, dtype, low_cpu_mem_usage):
    model = adapted(tiny("llama"), k=2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama", dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    plain = tiny("llama", dtype)
    plain.load_adapter(str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    for result in (logits(loaded, ids), logits(plain, ids)):
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), logits(model, ids), atol=0.1, rtol=0.1)


@LOW
def test_adapter_of_a_cast_base_is_accepted_by_the_wide_one(tiny, ids, tmp_path, low_cpu_mem_usage):
    adapted(tiny("llama", torch.bfloat16), k=2).save_pretrained(tmp_path)
    logits(PeftModel.from_pretrained(tiny("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage), ids)


def test_base_that_was_cast_after_injection_is_accepted(tiny, ids, tmp_path):
    model = adapted(tiny("llama"), k=2).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama", torch.bfloat16), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
