"""Saving and loading: the loaded model gives the same output bit for bit, from a file as small as it can be."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from peft_ext import NeuroAdaConfig
from peft_ext.sparse.choose import planning
from tests.sparse._probes import tensors_of
from tests.tuners.neuroada._common import (
    HALF_TYPES,
    adapted,
    adapter_bits,
    add,
    assert_equal_bits,
    fill,
    logits,
    wrapped,
)


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
    assert loaded.peft_config["default"].backend == options.get("backend", "auto")


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
    prefixes = {f"{name}.neuroada_delta" for name in wrapped(model)}
    expected = {f"{prefix}.{part}" for prefix in prefixes for part in ("weight", "indices", "fingerprint")}
    assert load_file(tmp_path / WEIGHTS).keys() == expected
    assert all(key.startswith("base_model.model.model.layers.") for key in expected)


def test_indices_take_the_narrowest_type(tiny, tmp_path):
    adapted(tiny("llama"), k=2).save_pretrained(tmp_path)
    types = {
        key.split(".")[-3]: value.dtype
        for key, value in load_file(tmp_path / WEIGHTS).items()
        if key.endswith(".indices")
    }
    assert types.pop("down_proj") == torch.uint16  # 272 inputs
    assert set(types.values()) == {torch.uint8}  # 32 inputs


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
    assert wrapped(model)["base_model.model.0"].deltas["default"].indices.tolist() == [[fan_in - 1]] * 2
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS)["base_model.model.0.neuroada_delta.indices"].dtype == dtype
    loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_equal_bits(adapter_bits(loaded), adapter_bits(model))
    x = torch.randn(3, fan_in)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


@LOW
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_keep_their_dtype_on_disk_and_back(tiny, ids, tmp_path, dtype, low_cpu_mem_usage):
    model = adapted(tiny("llama"), k=2, values_dtype=dtype)
    model.save_pretrained(tmp_path)
    values = {v.dtype for key, v in load_file(tmp_path / WEIGHTS).items() if key.endswith(".weight")}
    assert values == {getattr(torch, dtype)}
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {layer.deltas["default"].weight.dtype for layer in wrapped(loaded).values()} == values
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@LOW
def test_loaded_adapter_saves_as_the_same_file(tiny, tmp_path, low_cpu_mem_usage):
    adapted(tiny("llama"), k=2).save_pretrained(tmp_path / "first")
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "first", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.save_pretrained(tmp_path / "second")
    assert_equal_bits(load_file(tmp_path / "second" / WEIGHTS), load_file(tmp_path / "first" / WEIGHTS))
    first, second = ((tmp_path / name / "adapter_config.json").read_bytes() for name in ("first", "second"))
    assert first == second


# ------------------------------------------------------------------ several adapters


@LOW
def test_several_adapters_and_their_folders(tiny, ids, tmp_path, low_cpu_mem_usage):
    model = add(adapted(tiny("llama"), k=2), "other", k=3, selection="random", target_modules=["q_proj"])
    expected = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        expected[name] = logits(model, ids)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "other" / WEIGHTS).is_file()
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.load_adapter(tmp_path / "other", "second", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.load_adapter(tmp_path, "third", subfolder="other", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded, ids), expected["default"])
    for name in ("second", "third"):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded, ids), expected["other"])


@LOW
def test_subfolder(tiny, ids, tmp_path, low_cpu_mem_usage):
    model = add(adapted(tiny("llama"), k=2), "other", k=3)
    model.set_adapter("other")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny("llama"), str(tmp_path), subfolder="other", low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_selected_adapters(tiny, tmp_path):
    model = add(adapted(tiny("llama"), k=2), "other", k=3)
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert not (tmp_path / WEIGHTS).exists() and (tmp_path / "other" / WEIGHTS).is_file()


@LOW
def test_loading_under_another_name(tiny, ids, tmp_path, low_cpu_mem_usage):
    model = adapted(tiny("llama"), k=2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny("llama"), tmp_path, adapter_name="renamed", low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert loaded.active_adapters == ["renamed"]
    assert torch.equal(logits(loaded, ids), logits(model, ids))


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


def test_low_cpu_mem_usage_chooses_nothing_and_leaves_nothing_on_meta(tiny, tmp_path, monkeypatch):

    adapted(tiny("llama"), k=2).save_pretrained(tmp_path)
    monkeypatch.setattr(planning, "select_supports", lambda *args: pytest.fail("entries were chosen"))
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, low_cpu_mem_usage=True)
    tensors = tensors_of(loaded)
    assert not [name for name, tensor in tensors.items() if tensor.is_meta]
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith(".indices")} == {torch.int32}


@pytest.mark.parametrize("load", [AutoPeftModelForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_auto_classes_find_the_base_model(tiny, ids, tmp_path, load):
    model = adapted(tiny("llama"), k=2, task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path).eval(), ids), logits(model, ids))


@LOW
def test_config_that_was_read_before(tiny, ids, tmp_path, low_cpu_mem_usage):
    model = adapted(tiny("llama"), k=2, selection="random_network")
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, config=config, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


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
    result = logits(loaded, ids)
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


def test_loading_while_another_adapter_is_merged(tiny, ids, tmp_path):
    model = adapted(tiny("llama"), k=2)
    model.save_pretrained(tmp_path)
    expected = logits(model, ids)
    other = fill(get_peft_model(tiny("llama"), NeuroAdaConfig(k=4)), seed=5).eval()
    other.merge_adapter()
    other.load_adapter(tmp_path, "loaded")
    other.unmerge_adapter()
    other.set_adapter("loaded")
    assert torch.equal(logits(other, ids), expected)
