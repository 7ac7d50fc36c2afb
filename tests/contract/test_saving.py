"""Saving and loading for every method, through PEFT and through transformers."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.contract._common import (
    ALL_METHODS,
    METHODS,
    adapted,
    add,
    assert_equal_bits,
    base_bits,
    fill,
    layers_of,
    logits,
)


EVERY = pytest.mark.parametrize("method", METHODS)
# Steering looks for a decoder; the others adapt layers.
EVERYWHERE = pytest.mark.parametrize(
    ("method", "name"),
    [*((method, name) for method in METHODS for name in ("llama", "gpt2", "bert", "vit")), ("mores", "llama")],
)
LOW = pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
HEADED = ("bert", "vit")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@LOW
@EVERYWHERE
def test_reload_equals_bit_for_bit(tiny, inputs_of, tmp_path, method, name, low_cpu_mem_usage):
    model = adapted(tiny(name), method)
    head = [p for n, p in model.named_parameters() if ".modules_to_save." in n]
    assert bool(head) == (name in HEADED and method.startswith("gps"))
    for parameter in head:
        parameter.data += 0.1
    expected = logits(model, inputs_of(name))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(name), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not loaded.training and not [n for n, p in loaded.named_parameters() if p.requires_grad]
    assert torch.equal(logits(loaded, inputs_of(name)), expected)
    continued = PeftModel.from_pretrained(tiny(name), tmp_path, is_trainable=True)
    assert {n for n, p in continued.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@LOW
@pytest.mark.parametrize("method", ["neuroada", "mores"])
def test_several_adapters_and_their_folders(tiny, ids, tmp_path, method, low_cpu_mem_usage):
    inputs, options = {"input_ids": ids}, {"low_cpu_mem_usage": low_cpu_mem_usage}
    model = add(adapted(tiny("llama"), method), "other", method, **({"k": 3} if method in METHODS else {"rank": 3}))
    expected = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        expected[name] = logits(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, adapter_name="renamed", **options)
    loaded.load_adapter(tmp_path / "other", "second", **options)
    loaded.load_adapter(tmp_path, "third", subfolder="other", **options)
    assert loaded.active_adapters == ["renamed"]
    for name, saved in (("renamed", "default"), ("second", "other"), ("third", "other")):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded, inputs), expected[saved])
    alone = PeftModel.from_pretrained(tiny("llama"), str(tmp_path), subfolder="other", **options)
    assert torch.equal(logits(alone, inputs), expected["other"])
    loaded.save_pretrained(tmp_path / "again", selected_adapters=["renamed"])
    assert [path.name for path in (tmp_path / "again").iterdir() if path.is_dir()] == ["renamed"]
    assert (tmp_path / "again" / "renamed" / CONFIG).read_bytes() == (tmp_path / CONFIG).read_bytes()
    assert_equal_bits(load_file(tmp_path / "again" / "renamed" / WEIGHTS), load_file(tmp_path / WEIGHTS))


@pytest.mark.parametrize("method", ALL_METHODS)
def test_reload_by_every_route(tiny, ids, tmp_path, method):
    inputs = {"input_ids": ids}
    model = adapted(tiny("llama"), method, task_type="CAUSAL_LM")
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    for kind in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        assert torch.equal(logits(kind.from_pretrained(tmp_path), inputs), expected)


@pytest.mark.parametrize(
    ("method", "name"),
    [("neuroada", "llama"), ("neuroada with biases", "gpt2"), ("gps over the network", "llama"), ("mores", "llama")],
)
def test_adapters_of_a_model_of_transformers(tiny, ids, tmp_path, method, name):
    """`add_adapter` and its like, without a `PeftModel`."""
    inputs, model = {"input_ids": ids}, tiny(name)
    plain, bits = logits(model, inputs), base_bits(model)
    model.add_adapter(ALL_METHODS[method](), "first")
    assert torch.equal(logits(model, inputs), plain)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".first." in n for n in trained)
    first = logits(fill(model, "first"), inputs)
    model.save_pretrained(tmp_path / "first")
    for loaded in (
        PeftModel.from_pretrained(tiny(name), tmp_path / "first"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "first"),
    ):
        assert torch.equal(logits(loaded, inputs), first)

    other = adapted(tiny(name), method, seed=2)
    second = logits(other, inputs)
    other.save_pretrained(tmp_path / "second")
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter(str(tmp_path / "second"), "first")
    model.load_adapter(str(tmp_path / "second"), "second", is_trainable=True)
    for active, expected in (("second", second), ("first", first)):
        model.set_adapter(active)
        assert model.active_adapters() == [active] and torch.equal(logits(model, inputs), expected)
    model.disable_adapters()
    assert torch.equal(logits(model, inputs), plain)
    model.enable_adapters()
    assert torch.equal(logits(model, inputs), first)
    model.delete_adapter("first")
    assert not [key for key in model.state_dict() if ".first." in key]
    model.set_adapter("second")
    assert torch.equal(logits(model, inputs), second)
    model.train()(**inputs, labels=ids.where(torch.arange(7) > 4, -100)).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    model.delete_adapter("second")
    assert_equal_bits(base_bits(model.eval()), bits)
    assert torch.equal(logits(model, inputs), plain)


@EVERY
def test_missing_tensors_are_an_error_and_leave_the_model_as_it_was(tiny, inputs_of, tmp_path, method):
    adapted(tiny("bert"), method).save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS
    whole = load_file(path)
    for part in {key.rpartition(".")[2] for key in whole if "_delta." in key}:
        missing = next(key for key in whole if key.endswith(f"_delta.{part}"))
        save_file({key: value for key, value in whole.items() if key != missing}, path)
        base = tiny("bert")
        expected = logits(base, inputs_of("bert"))
        with pytest.raises(ValueError, match="lacks"):
            PeftModel.from_pretrained(base, tmp_path)
        assert not layers_of(base) and torch.equal(logits(base, inputs_of("bert")), expected), part
