"""Models read attributes of their layers; adapted layers have them too."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

from peft_ext import GPSConfig, NeuroAdaConfig, PSNConfig
from tests._models.layers import KINDS


LAYERS = {
    **{
        name: KINDS[name].build(torch.float32)
        for name in ("Linear", "Conv1D", "1d circular, grouped", "2d stride", "3d")
    },
    "MultiheadAttention": nn.MultiheadAttention(6, 2, dropout=0.1, batch_first=True),
}


def _adapted(layer):
    return get_peft_model(nn.ModuleDict({"layer": layer}), NeuroAdaConfig(target_modules=["layer"]))


@pytest.mark.parametrize("kind", LAYERS)
def test_an_adapted_layer_has_the_attributes_of_its_base_layer(kind):
    layer = copy.deepcopy(LAYERS[kind])
    layer.mark = "put there by the model"
    for model in (_adapted(layer), copy.deepcopy(_adapted(layer)), pickle.loads(pickle.dumps(_adapted(layer)))):
        adapted = model.base_model.model["layer"]
        public = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
        assert public["mark"] and {name: getattr(adapted, name) for name in public} == public
        with pytest.raises(AttributeError, match=f"'{type(adapted).__name__}' object has no attribute 'other'"):
            adapted.other  # noqa: B018


def test_the_attributes_are_those_of_the_layer_below_all_adapters():
    model = nn.ModuleDict({"layer": copy.deepcopy(LAYERS["2d stride"])})
    model = get_peft_model(model, LoraConfig(target_modules=["layer"])).base_model.model
    adapted = get_peft_model(model, NeuroAdaConfig(target_modules=["layer"])).base_model.model["layer"]
    assert adapted.padding == (1, 2)
    # Another tuner's parameters, and what accelerate hangs on a module, belong to the module that they are on.
    adapted.base_layer._hf_hook = object()
    assert not any(hasattr(adapted, name) for name in ("lora_A", "scaling", "_hf_hook"))


@pytest.mark.parametrize("config", [NeuroAdaConfig, PSNConfig, GPSConfig])
def test_mobilenet_which_pads_by_what_its_convolutions_say_runs_and_merges(config):
    torch.manual_seed(0)
    shape = MobileNetV2Config(image_size=32, depth_multiplier=0.1, num_labels=3)
    base = MobileNetV2ForImageClassification(shape).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = base(x).logits
    options = {"target_modules": "all-neurons", "selection": "magnitude"}
    assert torch.equal(get_peft_model(copy.deepcopy(base), config(**options)).eval()(x).logits, expected)
    model = get_peft_model(base, config(**options, init_weights=False)).eval()
    adapted = model(x).logits
    assert not torch.allclose(adapted, expected)
    torch.testing.assert_close(model.merge_and_unload()(x).logits, adapted)


def test_a_model_that_reads_attributes_compiles_into_one_graph():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3, stride=2)

        def forward(self, x):
            return self.conv(x) * self.conv.stride[0]

    model = get_peft_model(Reader(), NeuroAdaConfig(target_modules=["conv"], init_weights=False))
    x = torch.randn(1, 2, 8, 8)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
