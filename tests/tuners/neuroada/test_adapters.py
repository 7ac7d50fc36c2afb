"""Several adapters on one model: switching, disabling, deleting, and what PEFT reports about them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_ext import NeuroAdaConfig
from tests.tuners.neuroada._common import SEVEN, adapted, add, assert_equal_bits, base_bits, fill, logits, wrapped


@pytest.fixture
def base_logits(llama, ids):
    return logits(llama, ids)


@pytest.fixture
def model(base_logits, llama):
    """Two adapters on different modules with different options; `default` is active."""
    return add(adapted(llama, k=2), "other", k=3, target_modules=["q_proj", "up_proj"], selection="random")


def test_adapter_set_for_inference_is_frozen(model):
    model.set_adapter("other", inference_mode=True)
    assert not [n for n, p in model.named_parameters() if p.requires_grad]


def test_two_active_adapters_train_together(model, ids):
    model.base_model.set_adapter(["default", "other"])
    model(ids, labels=ids).loss.backward()
    for layer in wrapped(model).values():
        for delta in layer.neuroada_delta.values():
            assert delta.weight.grad is not None and delta.weight.grad.any()


def test_disabling_gives_the_base_model_and_comes_back(model, ids, base_logits):
    expected = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base_logits)
    assert torch.equal(logits(model, ids), expected)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model, ids), base_logits)
    assert model.get_model_status().enabled is False
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model, ids), expected)


def test_disabling_while_merged_gives_the_base_model(model, ids, base_logits):
    bits = base_bits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base_logits)
    assert_equal_bits(base_bits(model), bits)


def test_deleting_the_active_adapter_activates_another(model, ids):
    model.set_adapter("other")
    expected = logits(model, ids)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert set(model.peft_config) == {"other"} and model.active_adapters == ["other"]
    assert torch.equal(logits(model, ids), expected)


def test_deleting_leaves_no_tensor_of_the_adapter(model, ids):
    expected = logits(model, ids)
    model.delete_adapter("other")
    assert not [key for key in model.state_dict() if ".other." in key]
    assert not [name for name, layer in wrapped(model).items() if "other" in layer.backends]
    assert torch.equal(logits(model, ids), expected)
    with pytest.raises(ValueError, match="other does not exist"):
        model.delete_adapter("other")


def test_name_of_a_deleted_adapter_can_be_used_again(model, ids):
    model.delete_adapter("other")
    add(model, "other", k=1)
    model.set_adapter("other")
    assert {delta.weight.shape[1] for layer in wrapped(model).values() for delta in [layer.deltas["other"]]} == {1}
    logits(model, ids)


def test_deleting_a_merged_adapter_is_refused_and_it_can_still_be_unmerged(model):
    bits = base_bits(model)
    model.merge_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"\['other'\] while they are merged"):
        model.delete_adapter("other")
    model.unmerge_adapter()
    assert_equal_bits(base_bits(model), bits)


def test_all_linear_for_a_second_adapter(llama):
    model = adapted(llama, k=1, target_modules=["q_proj"])
    add(model, "other", k=1, target_modules="all-linear")
    assert sum("other" in layer.deltas for layer in wrapped(model).values()) == 2 * len(SEVEN)


def test_two_adapters_that_train_biases_are_refused(tiny):
    model = get_peft_model(tiny("bert"), NeuroAdaConfig(bias="all"))
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("other", NeuroAdaConfig(bias="neuroada_only"))
    assert set(model.peft_config) == {"default"}


def test_model_status(model):
    status = model.get_model_status()
    assert status.adapter_model_type == "NeuroAdaModel"
    assert status.peft_types == {"default": "NEUROADA", "other": "NEUROADA"}
    assert status.available_adapters == ["default", "other"] and status.active_adapters == ["default"]
    assert status.num_adapter_layers == 14 and status.merged_adapters == []
    assert status.requires_grad == {"default": True, "other": False}
    # rows per block: four of 32, two of 272, one of 32
    assert status.trainable_params == 2 * 2 * (5 * 32 + 2 * 272)
    assert status.enabled is True and status.devices == {"default": ["cpu"], "other": ["cpu"]}


def test_layer_status(model):
    by_name = {status.name: status for status in model.get_layer_status()}
    assert len(by_name) == 14
    status = by_name["model.model.layers.0.self_attn.q_proj"]
    assert status.module_type == "neuroada.NeuroAdaLinear"
    assert status.available_adapters == ["default", "other"]
    assert by_name["model.model.layers.0.mlp.down_proj"].available_adapters == ["default"]
    model.merge_adapter()
    assert {tuple(status.merged_adapters) for status in model.get_layer_status()} == {("default",)}


def test_representation_names_method_and_size(model):
    text = repr(wrapped(model)["base_model.model.model.layers.0.self_attn.q_proj"])
    assert text.startswith("neuroada.NeuroAdaLinear(") and "values=32x2, fan_in=32" in text


def test_adapters_of_other_methods_beside_ours_are_refused_by_peft(model):
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
    assert set(model.peft_config) == {"default", "other"}


def test_printed_share_of_trained_parameters(llama, capsys):
    get_peft_model(llama, NeuroAdaConfig(k=1)).print_trainable_parameters()
    assert f"trainable params: {2 * (5 * 32 + 2 * 272):,}" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("autocast", [True, False])
def test_dtype_of_values(tiny, dtype, autocast):
    config = NeuroAdaConfig(values_dtype=dtype)
    model = get_peft_model(tiny("llama", torch.bfloat16), config, autocast_adapter_dtype=autocast)
    expected = torch.float32 if autocast else torch.bfloat16
    if dtype is not None:
        expected = getattr(torch, dtype)
    assert {layer.deltas["default"].weight.dtype for layer in wrapped(model).values()} == {expected}


@pytest.mark.parametrize("values", ["bfloat16", "float16"])
def test_values_of_half_the_bytes_train_on_a_wide_base(llama, ids, values):
    model = fill(get_peft_model(llama, NeuroAdaConfig(k=2, values_dtype=values)))
    loss = model(ids, labels=ids).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {getattr(torch, values)}
