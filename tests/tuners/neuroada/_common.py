"""What the tests of NeuroAda share: outputs of a model, adapters with values in them, and what must not change."""

import torch
from peft import get_peft_model

from peft_ext import NeuroAdaConfig
from peft_ext.tuners.neuroada import NeuroAdaLinear


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HALF_TYPES = [torch.bfloat16, torch.float16]


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def wrapped(model):
    """The adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NeuroAdaLinear)}


def fill(model, adapter_name="default", seed=1, scale=0.3):
    """Give an adapter values as training would."""
    generator = torch.Generator().manual_seed(seed)
    for layer in wrapped(model).values():
        if adapter_name in layer.neuroada_delta:
            weight = layer.neuroada_delta[adapter_name].weight
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return model


def adapted(base, seed=1, **options):
    """A base model with one adapter in it, with values."""
    return fill(get_peft_model(base, NeuroAdaConfig(**options)).eval(), seed=seed)


def add(model, adapter_name, seed=2, **options):
    """Another adapter, with values, on an adapted model."""
    model.add_adapter(adapter_name, NeuroAdaConfig(**options))
    return fill(model, adapter_name, seed=seed)


def base_bits(model):
    """A copy of every tensor of the base model, under the names it has without adapters."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if "neuroada_" not in name
    }


def adapter_bits(model, adapter_name="default"):
    """A copy of every tensor of an adapter."""
    return {
        f"{name}.{key}": tensor.clone()
        for name, layer in wrapped(model).items()
        for key, tensor in layer.neuroada_delta[adapter_name].state_dict().items()
    }


def assert_equal_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        same = actual[name].reshape(-1).view(torch.uint8) == tensor.reshape(-1).view(torch.uint8)
        assert same.all(), name
