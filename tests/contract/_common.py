"""The methods, each with the options that differ, and what the tests of all of them share."""

import torch
from peft import get_peft_model

from peft_ext import GPSConfig, MoReSConfig, NeuroAdaConfig, PSNConfig
from peft_ext.sparse.layers import SparseLayer
from peft_ext.tuners.mores import MoReSLayer


# GPS as it comes (by scores, with biases and head) needs data; the rest of its behaviour does not depend on these.
METHODS = {
    "neuroada": lambda **options: NeuroAdaConfig(**{"k": 2} | options),
    "neuroada with biases": lambda **options: NeuroAdaConfig(**{"k": 2, "train_bias": True} | options),
    "psn by k": lambda **options: PSNConfig(**{"k": 5} | options),
    "psn by density": lambda **options: PSNConfig(**{"density": 0.3} | options),
    "gps": lambda **options: GPSConfig(**{"k": 1, "selection": "magnitude"} | options),
    "gps over the network": lambda **options: GPSConfig(**{"k": 1, "selection": "magnitude_network"} | options),
}
STEERING = {"mores": lambda **options: MoReSConfig(**{"rank": 2, "token_positions": "f2+l2"} | options)}
ALL_METHODS = METHODS | STEERING


def layers_of(model):
    """The adapted layers by name."""
    kinds = (SparseLayer, MoReSLayer)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def adapters_of(layer):
    """What a layer trains, by name of the adapter."""
    return getattr(layer, layer.adapter_layer_names[0])


def fill(model, adapter_name="default", seed=1, scale=0.3):
    """Give an adapter values, and biases where it has them, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers_of(model).values():
        if adapter_name in adapters_of(layer):
            for parameter in adapters_of(layer)[adapter_name].parameters():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def adapted(base, method, seed=1, **options):
    return fill(get_peft_model(base, ALL_METHODS[method](**options)).eval(), seed=seed)


def add(model, adapter_name, method, seed=2, **options):
    model.add_adapter(adapter_name, ALL_METHODS[method](**options))
    return fill(model, adapter_name, seed=seed)


def logits(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def adapter_bits(model, adapter_name="default"):
    """A copy of every tensor of an adapter."""
    return {
        f"{name.removeprefix('base_model.model.')}.{key}": tensor.clone()
        for name, layer in layers_of(model).items()
        for key, tensor in adapters_of(layer)[adapter_name].state_dict().items()
    }


def base_bits(model):
    """A copy of every tensor of the base model, without heads that are trained whole."""
    marks = ("_delta.", ".mores_steering.", ".modules_to_save.")
    return {
        name.replace("base_model.model.", "").replace(".base_layer", "").replace(".original_module", ""): t.clone()
        for name, t in model.state_dict().items()
        if not any(mark in name for mark in marks)
    }


def assert_equal_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
