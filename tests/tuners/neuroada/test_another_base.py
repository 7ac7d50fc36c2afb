"""Another base model on purpose: every way of loading takes it inside `another_base`, and nothing of it is saved."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import peft_ext
from peft_ext import NeuroAdaConfig, cli
from tests.contract._common import layers_of
from tests.contract._damage import options
from tests.contract._ways import as_a_second, by_peft, by_transformers, in_little_memory, swapped
from tests.tuners.neuroada._common import adapted, logits


@pytest.fixture
def sibling(tiny):
    """A model that was trained further."""
    model = tiny("llama").requires_grad_(False)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.01 * parameter.std() * torch.randn_like(parameter)
    return model


@pytest.fixture
def adapter(tiny, tmp_path):
    adapted(tiny("llama"), k=2).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def beside_another(model, adapter):
    return as_a_second(adapted(model, k=1), adapter)


def by_hot_swap(model, adapter):
    return swapped(adapted(model, k=2), adapter)


def by_state_dict(model, adapter):
    model = adapted(model, k=2)
    set_peft_model_state_dict(model, load_peft_weights(str(adapter)))
    return model


WAYS = [by_peft, in_little_memory, beside_another, by_transformers, by_hot_swap, by_state_dict]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_of_loading(way, sibling, adapter, ids):
    with torch.no_grad():
        base = {name: p.clone() for name, p in sibling.named_parameters()}
    with pytest.raises(ValueError, match=r"near them.*trained further.*peft_ext\.another_base"):
        way(sibling, adapter)
    with peft_ext.another_base():
        model = way(sibling, adapter).eval()
    found = logits(model, ids)  # outside
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, layer in layers_of(model).items():
        delta = layer.deltas[layer.active_adapters[0]]
        key = f"base_model.model.{name.removeprefix('base_model.model.')}.neuroada_delta"
        weight = base[f"{name.removeprefix('base_model.model.')}.weight"].clone()
        assert torch.equal(layer.get_base_layer().weight, weight)
        weight.scatter_add_(1, tensors[f"{key}.indices"].long(), tensors[f"{key}.weight"])
        torch.testing.assert_close(
            layer.get_base_layer().weight + layer.get_delta_weight(layer.active_adapters[0]), weight
        )
        assert torch.equal(delta.fingerprint, tensors[f"{key}.fingerprint"])
    assert bool(found.isfinite().all())


def test_auto_class(sibling, adapter, tmp_path):
    sibling.save_pretrained(tmp_path / "sibling")
    options(base_model_name_or_path=str(tmp_path / "sibling"), task_type="CAUSAL_LM")(adapter)
    with pytest.raises(ValueError, match="another base model"):
        AutoPeftModelForCausalLM.from_pretrained(adapter)
    with peft_ext.another_base():
        AutoPeftModelForCausalLM.from_pretrained(adapter)


def test_nothing_of_it_is_saved(sibling, adapter, tmp_path):
    with peft_ext.another_base():
        model = PeftModel.from_pretrained(sibling, adapter)
    model.save_pretrained(tmp_path / "again")
    again, first = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "again", adapter))
    assert again.keys() == first.keys() and all(torch.equal(again[key], first[key]) for key in first)
    with pytest.raises(ValueError, match="another base model"):
        PeftModel.from_pretrained(model.unload(), tmp_path / "again")


def test_another_shape_is_refused_all_the_same(tiny, adapter):
    config = tiny("llama").config
    other = LlamaForCausalLM(type(config)(**{**config.to_dict(), "layer_types": None, "intermediate_size": 280}))
    with peft_ext.another_base(), pytest.raises(ValueError, match="gate_proj|down_proj|up_proj"):
        PeftModel.from_pretrained(other, adapter)


def test_merging_files(sibling, adapter, tmp_path, capsys):
    sibling.save_pretrained(tmp_path / "sibling")
    arguments = ["merge", str(tmp_path / "sibling"), str(adapter), str(tmp_path / "merged")]
    assert cli.main(arguments) == 1
    assert "--another-base" in capsys.readouterr().err
    assert cli.main([*arguments, "--another-base"]) == 0
    with peft_ext.another_base():
        PeftModel.from_pretrained(sibling, adapter).merge_and_unload().save_pretrained(tmp_path / "reference")
    merged, reference = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "reference"))
    assert all(torch.equal(merged[key], reference[key]) for key in reference)


def test_square_weights_of_gpt2_are_told_from_their_transpose(tiny, tmp_path):
    base = tiny("gpt2")
    model = get_peft_model(base, NeuroAdaConfig(k=2, target_modules=["c_proj"]))
    for name, parameter in model.named_parameters():
        if "neuroada_delta" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "adapter")
    sibling = tiny("gpt2")
    for parameter in sibling.parameters():
        parameter.data *= 1.001
    sibling.save_pretrained(tmp_path / "sibling")
    with peft_ext.another_base():
        peft_ext.export.merge_checkpoint(tmp_path / "sibling", tmp_path / "adapter", tmp_path / "merged")
        PeftModel.from_pretrained(sibling, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "ref")
    merged, reference = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "ref"))
    assert all(torch.equal(merged[key], reference[key]) for key in reference)
