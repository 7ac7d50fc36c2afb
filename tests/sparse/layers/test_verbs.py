"""PEFT's verbs on a model with a convolution, an attention and a linear layer."""

import copy

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn

from peft_ext import NeuroAdaConfig, hotswap_adapter


TARGETS = ["conv", "attention", "linear"]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        hidden = torch.tanh(self.conv(x)).flatten(2).transpose(1, 2)
        return self.linear(self.attention(hidden, hidden, hidden)[0])


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def x():
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def _config(**options):
    return NeuroAdaConfig(k=2, target_modules=TARGETS, init_weights=False, **options)


def _adapted(base, **options):
    return get_peft_model(copy.deepcopy(base), _config(**options)).eval()


@pytest.mark.parametrize("backend", ["auto", "bypass"])
def test_it_compiles_into_one_graph(base, x, backend):
    model = _adapted(base, backend=backend)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


def test_a_weighted_combination_is_the_sum_of_the_adapters(base, x):
    model = _adapted(base)
    model.add_adapter("b", _config(selection="random"))
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum")
    model.base_model.set_adapter(["default", "b"])
    expected = model(x)
    model.set_adapter("sum")
    torch.testing.assert_close(model(x), expected)


def test_hot_swapping(base, x, tmp_path):
    model, other = _adapted(base), _adapted(base, selection="random")
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("selection", ["magnitude", "random_network"])
def test_a_file_that_lacks_a_tensor_leaves_the_model_as_it_was(base, selection, tmp_path):
    _adapted(base, selection=selection).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for missing in sorted(tensors):
        save_file({key: tensor for key, tensor in tensors.items() if key != missing}, file)
        model = copy.deepcopy(base)
        with pytest.raises(ValueError):
            PeftModel.from_pretrained(model, tmp_path)
        assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
        for parameter, before in zip(model.parameters(), base.parameters(), strict=True):
            assert torch.equal(parameter, before) and parameter.requires_grad


def test_injection_by_the_keys_of_a_state_dict(base, x):
    injected = inject_adapter_in_model(_config(), copy.deepcopy(base)).eval()
    state_dict = get_peft_model_state_dict(injected)
    assert any(key.startswith("attention.q_proj.") for key in state_dict)
    for low_cpu_mem_usage in (False, True):
        other = inject_adapter_in_model(
            _config(), copy.deepcopy(base), state_dict=state_dict, low_cpu_mem_usage=low_cpu_mem_usage
        )
        result = set_peft_model_state_dict(other, state_dict, low_cpu_mem_usage=low_cpu_mem_usage)
        assert not result.unexpected_keys
        assert torch.equal(other.eval()(x), injected(x))


def test_only_linear_layers_say_that_peft_can_convert_them_to_lora(base):
    model = _adapted(base).base_model.model
    assert model.linear.supports_lora_conversion()
    assert not model.conv.supports_lora_conversion()
    assert not model.attention.parts["q_proj"].supports_lora_conversion()
