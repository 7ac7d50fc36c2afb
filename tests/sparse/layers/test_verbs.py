"""PEFT's verbs on a network of each layer type."""

import copy
import itertools
import pickle

import pytest
import torch
from peft import (
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_ext import NeuroAdaConfig, hotswap_adapter
from peft_ext.sparse.layers import SparseLayer
from tests._models.networks import NETWORKS, make_network
from tests.contract._untouched import Untouched

from .._asserts import assert_same_state, state_bits


EVERY_KIND = pytest.mark.parametrize("kind", NETWORKS)


def _config(targets, **options):
    return NeuroAdaConfig(**{"k": 2, "target_modules": targets, "init_weights": False, **options})


def _two_adapters(kind):
    """A model with two adapters on weights and biases, a batch, and what it gives with each of them and with none."""
    network, x, targets = make_network(kind)
    with_biases = {"train_bias": kind != "shared"}  # layers over one weight that have biases of their own
    model = get_peft_model(copy.deepcopy(network), _config(targets, **with_biases)).eval()
    model.add_adapter("other", _config(targets, selection="random", **with_biases))
    alone = {"__base__": network.eval().requires_grad_(False)(x)}
    for name in ("other", "default"):
        model.set_adapter(name)
        alone[name] = model(x)
    for one, two in itertools.combinations(alone.values(), 2):
        assert not torch.allclose(one, two)
    return model, x, {name: y.detach() for name, y in alone.items()}


@EVERY_KIND
def test_switch_disable_delete_and_unload(kind):
    model, x, alone = _two_adapters(kind)
    for name in ("other", "default", "other"):
        model.set_adapter(name)
        assert torch.equal(model(x), alone[name])
        status = get_model_status(model)
        assert (status.active_adapters, sorted(status.available_adapters)) == ([name], ["default", "other"])
    assert {tuple(layer.active_adapters) for layer in get_layer_status(model)} == {("other",)}
    with model.disable_adapter():
        assert torch.equal(model(x), alone["__base__"]) and not get_model_status(model).enabled
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(model(x), alone["default"])
    assert not [name for name in model.state_dict() if "other" in name]
    network, types = model.unload(), [type(module) for module in make_network(kind)[0].modules()]
    assert torch.equal(network(x), alone["__base__"]) and [type(module) for module in network.modules()] == types


@EVERY_KIND
def test_two_at_once_merge_and_combine(kind):
    model, x, alone = _two_adapters(kind)
    before = state_bits(model)
    model.merge_adapter(["other"])
    assert get_model_status(model).merged_adapters == ["other"]
    torch.testing.assert_close(model(x), alone["other"])
    model.unmerge_adapter()
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    for _ in range(2):
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(model(x), both)
        model.unmerge_adapter()
        assert_same_state(model, before)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(model(x), both)
    merged, network = model.merge_and_unload(), make_network(kind)[0]
    assert [type(module) for module in merged.modules()] == [type(module) for module in network.modules()]
    torch.testing.assert_close(merged(x), both)


@EVERY_KIND
def test_disabled_while_merged(kind):
    model, x, alone = _two_adapters(kind)
    before = state_bits(model)
    model.merge_adapter(["default", "other"])
    with model.disable_adapter():  # which unmerges in the forward pass
        assert torch.equal(model(x), alone["__base__"])
    assert_same_state(model, before)


@EVERY_KIND
def test_each_sample_of_a_batch_has_its_adapter(kind):
    model, x, alone = _two_adapters(kind)
    names = ["other", "__base__", "default", "other", "default", "__base__"]
    mixed = model(x, adapter_names=names)
    torch.testing.assert_close(mixed, torch.stack([alone[name][sample] for sample, name in enumerate(names)]))


@EVERY_KIND
def test_hot_swapping(kind, tmp_path):
    model, x, alone = _two_adapters(kind)
    model.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path / "other")
    assert torch.equal(model(x), alone["other"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@EVERY_KIND
def test_a_copy_is_a_model_of_its_own(kind, copied):
    model, x, alone = _two_adapters(kind)
    before, twin = state_bits(model), copied(model)
    assert torch.equal(twin(x), alone["default"])
    twin.merge_adapter()
    torch.testing.assert_close(twin(x), alone["default"])
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert_same_state(model, before)
    assert torch.equal(model(x), alone["default"])


@pytest.mark.parametrize("kind", ["Conv2d", "MultiheadAttention"])
def test_it_compiles_into_one_graph(kind):
    model, x, _ = _two_adapters(kind)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


@pytest.mark.parametrize("selection", ["magnitude", "random_network"])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "MultiheadAttention", "experts"])
def test_a_file_that_lacks_a_tensor_leaves_the_model_as_it_was(kind, selection, tmp_path):
    base, _, targets = make_network(kind)
    get_peft_model(copy.deepcopy(base), _config(targets, selection=selection)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for missing in sorted(tensors):
        save_file({key: tensor for key, tensor in tensors.items() if key != missing}, file)
        model = copy.deepcopy(base)
        with Untouched(model), pytest.raises(ValueError):
            PeftModel.from_pretrained(model, tmp_path)


@EVERY_KIND
def test_injection_by_the_keys_of_a_state_dict(kind):
    base, x, targets = make_network(kind)
    injected = inject_adapter_in_model(_config(targets), copy.deepcopy(base)).eval()
    state_dict = get_peft_model_state_dict(injected)
    for low_cpu_mem_usage in (False, True):
        options = {"state_dict": state_dict, "low_cpu_mem_usage": low_cpu_mem_usage}
        other = inject_adapter_in_model(_config(targets), copy.deepcopy(base), **options)
        result = set_peft_model_state_dict(other, state_dict, low_cpu_mem_usage=low_cpu_mem_usage)
        assert not result.unexpected_keys
        assert torch.equal(other.eval()(x), injected(x))


@pytest.mark.parametrize("bias", ["all", "neuroada_only"])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "MultiheadAttention", "experts in columns"])
def test_biases_of_the_base_are_trained_and_saved(kind, bias, tmp_path):
    base, x, targets = make_network(kind)
    model = get_peft_model(copy.deepcopy(base), _config(targets, bias=bias)).eval()
    model(x).square().sum().backward()
    biases = [p for name, p in model.named_parameters() if name.endswith("bias") and ".base_layer" in name]
    assert len(biases) >= 2 and all(parameter.grad.abs().max() > 0 for parameter in biases)
    for parameter in biases:
        parameter.data += 0.5
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path).eval()(x), model(x))


@EVERY_KIND
def test_only_linear_layers_say_that_peft_can_convert_them_to_lora(kind):
    network, _, targets = make_network(kind)
    for layer in get_peft_model(network, _config(targets)).modules():
        if isinstance(layer, SparseLayer):
            assert layer.supports_lora_conversion() == isinstance(layer.get_base_layer(), (nn.Linear, Conv1D))
