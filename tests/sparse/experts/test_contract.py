"""PEFT's verbs on adapters of fused experts, where they are not those of every layer type (`layers/test_verbs.py`)."""

import itertools

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_ext import NeuroAdaConfig
from peft_ext.sparse.layers import SparseExperts
from tests._models.experts import COLUMNS, IMPLEMENTATIONS, adapted, fill, layers_of, run, tiny, token_ids
from tests.contract._untouched import Untouched


EACH_LAYOUT = pytest.mark.parametrize("name", ["mixtral", *COLUMNS])
IDS = token_ids(4)


def logits(model, **inputs):
    with torch.no_grad():
        return run(model, input_ids=IDS, **inputs)


def add(model, adapter_name="other", seed=5, **options):
    options = {"k": 1, "selection": "random", "target_modules": ["gate_up_proj"], "train_bias": True} | options
    model.add_adapter(adapter_name, NeuroAdaConfig(**options))
    return fill(model, adapter_name, seed=seed)


def two_adapters(name="mixtral", **options):
    """A model, and what it computes with each of its adapters and with none."""
    model = add(adapted(name, **options))
    expected = {"__base__": logits(tiny(name))}
    for adapter_name in ("other", "default"):
        model.set_adapter(adapter_name)
        expected[adapter_name] = logits(model)
    for one, two in itertools.combinations(expected.values(), 2):
        assert (one - two).abs().max() > 0.01
    return model, expected


@pytest.mark.parametrize(
    ("name", "implementation"), [*(("mixtral", kind) for kind in IMPLEMENTATIONS), *((n, "eager") for n in COLUMNS)]
)
def test_each_sample_of_a_batch_has_its_adapter(name, implementation):
    model, expected = two_adapters(name, implementation=implementation)
    names = ["default", "other", "__base__", "default"]
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=names).logits
    each = torch.stack([expected[adapter_name][i] for i, adapter_name in enumerate(names)])
    torch.testing.assert_close(mixed, each, atol=1e-5, rtol=1e-5)
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(input_ids=IDS, adapter_names=names)


@pytest.mark.parametrize("other", [{"target_parameters": ["gate_up_proj"]}, {"target_modules": ["o_proj"]}], ids=str)
def test_adapters_that_target_parameters_name_combine(other, tmp_path):
    model = get_peft_model(tiny(), NeuroAdaConfig(target_parameters=["experts.down_proj"])).eval()
    model.add_adapter("other", NeuroAdaConfig(**other))
    fill(model)
    fill(model, "other", seed=5)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), both, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path / "sum")), logits(model))


def _experts(model):
    return next(name for name, m in model.base_model.model.named_modules() if isinstance(m, SparseExperts))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@EACH_LAYOUT
def test_saved_and_loaded_in_every_bit(name, low_cpu_mem_usage, tmp_path):
    model, expected = two_adapters(name)
    model.save_pretrained(tmp_path)
    for adapter_name, folder in (("default", tmp_path), ("other", tmp_path / "other")):
        loaded = PeftModel.from_pretrained(tiny(name), folder, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded), expected[adapter_name])
        assert [k for k, p in loaded.named_parameters() if p.requires_grad] == []
    plain = tiny(name)
    plain.load_adapter(str(tmp_path / "other"))
    assert torch.equal(logits(plain), expected["other"])


def test_another_base_model_is_refused_and_left_as_it_was(tmp_path):
    adapted().save_pretrained(tmp_path)
    base = tiny()
    with torch.no_grad():
        next(p for n, p in base.named_parameters() if n.endswith("down_proj")).mul_(2)
    with Untouched(base), pytest.raises(ValueError, match="made for another base model"):
        PeftModel.from_pretrained(base, tmp_path)


def test_conversion_to_lora_is_refused():
    with pytest.raises(TypeError, match="do not support LoRA conversion.*ExpertBank"):
        convert_to_lora(adapted(), rank=2)


@EACH_LAYOUT
def test_a_merged_model_is_saved_as_transformers_saves_it(name, tmp_path):
    """In most checkpoints each expert has tensors of its own."""
    model = adapted(name)
    expected = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(logits(loaded.eval()), expected, atol=1e-5, rtol=1e-5)


def test_one_parameter_for_all_layers_has_one_adapter():
    base = tiny(num_hidden_layers=2)
    first, second = (layer.mlp.experts for layer in base.model.layers)
    second.gate_up_proj = first.gate_up_proj
    model = adapted(base=base)
    layers = [layer for key, layer in layers_of(model).items() if key.endswith("gate_up_proj")]
    assert len(layers) == 2 and layers[0].deltas["default"] is layers[1].deltas["default"]
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


def test_a_weight_that_something_else_uses_is_merged_into_a_copy():
    base = tiny("gpt_oss", num_hidden_layers=2)
    first, second = (layer.mlp.experts for layer in base.model.layers)
    for name in ("gate_up_proj", "gate_up_proj_bias"):
        setattr(second, name, getattr(first, name))
    options = {"layers_to_transform": [0], "train_bias": True}
    model = adapted("gpt_oss", base=base, **options)
    shared, bits = first.gate_up_proj, first.gate_up_proj.detach().clone()
    expected = logits(model)
    for _ in range(2):
        model.merge_adapter()
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
        assert second.gate_up_proj is shared and torch.equal(shared, bits) and first.gate_up_proj is not shared
        assert first.gate_up_proj_bias is not second.gate_up_proj_bias
        model.unmerge_adapter()
        assert first.gate_up_proj is shared and first.gate_up_proj_bias is second.gate_up_proj_bias
        assert torch.equal(logits(model), expected)


def test_a_hook_on_the_experts_is_not_passed_over():
    model = adapted()
    experts = model.base_model.model.get_submodule(_experts(model))
    experts.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="MixtralExperts has hooks"):
        logits(model)
    with model.disable_adapter():
        logits(model)


def test_experts_that_another_method_has_adapted_are_refused():
    from peft import LoraConfig, inject_adapter_in_model

    base = tiny()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]), base)
    with pytest.raises(TypeError, match="experts that another method has adapted"):
        get_peft_model(base, NeuroAdaConfig(target_modules=["experts"]))


def test_what_models_read_of_their_experts_is_still_there():
    model = adapted()
    experts = model.base_model.model.get_submodule(_experts(model))
    assert experts.num_experts == 4 and experts.config is not None
    assert isinstance(experts.base_layer, nn.Module) and "ExpertBank" in repr(experts)
