"""PSN's own options, and its parameter counts in the thesis."""

import pytest
import torch
from peft import PeftConfig, get_peft_model
from transformers import (
    SamConfig,
    SamModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from peft_ext import PSNConfig
from tests.contract._common import layers_of


SWIN_B = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}


def on_meta(model_class, config):
    with torch.device("meta"):
        return model_class(config)


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("model_class", "config", "printed"),
    [(ViTForImageClassification, ViTConfig(), 29.38), (SwinForImageClassification, SwinConfig(**SWIN_B), 37.60)],
    ids=["ViT-B/16", "Swin-B"],
)
def test_share_of_an_encoder_is_the_thesis_s(model_class, config, printed):
    """K=300 (thesis table 17); the heads are not in the count."""
    base = on_meta(model_class, config)
    encoder = count(base) - count(base.classifier)
    trained, _ = get_peft_model(base, PSNConfig(k=300)).get_nb_trainable_parameters()
    assert abs(100 * trained / encoder - printed) < 1


def test_share_of_sam_with_its_decoder_is_the_thesis_s():
    base = on_meta(SamModel, SamConfig())
    total = count(base)
    encoder = r"vision_encoder\..*(qkv|proj|lin1|lin2|projection|conv1|conv2)"
    config = PSNConfig(k=300, target_modules=encoder, modules_to_save=["mask_decoder"])
    trained, _ = get_peft_model(base, config).get_nb_trainable_parameters()
    assert abs(100 * trained / total - 30.97) < 1


@pytest.mark.parametrize("density", [0.3, 0.6, 1.0, 1e-6])
def test_density_is_the_share_of_each_neurons_inputs(tiny, density):
    model = get_peft_model(tiny("vit"), PSNConfig(density=density))
    for layer in layers_of(model).values():
        delta = layer.deltas["default"]
        assert delta.indices.shape == (layer.out_features, max(1, round(density * delta.fan_in)))


def test_entries_are_the_largest_of_each_neuron(tiny):
    base = tiny("gpt2")
    weights = {name: module.weight.detach().clone() for name, module in base.named_modules() if "c_" in name}
    model = get_peft_model(base, PSNConfig(density=0.25))
    assert len(layers_of(model)) == len(weights)
    for name, layer in layers_of(model).items():
        delta = layer.deltas["default"]
        rows = weights[name.removeprefix("base_model.model.")].t().abs()
        expected = rows.sort(1, descending=True).values[:, : delta.indices.shape[1]]
        assert torch.equal(rows.gather(1, delta.indices.long()).sort(1, descending=True).values, expected)


def test_size_is_thirty_percent_unless_given():
    assert (PSNConfig().k, PSNConfig().density) == (None, 0.3)
    assert (PSNConfig(k=300).k, PSNConfig(k=300).density) == (300, None)


@pytest.mark.parametrize("options", [{}, {"k": 300}, {"density": 0.6}], ids=str)
def test_config_comes_back_as_it_was_saved(tmp_path, options):
    config = PSNConfig(**options)
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is PSNConfig and (loaded.k, loaded.density) == (config.k, config.density)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 3, "density": 0.3}, ["k=3", "density=0.3", "one of them"]),
        ({"density": 0}, ["density=0", "(0, 1]"]),
        ({"density": 1.5}, ["density=1.5", "(0, 1]"]),
        ({"density": "0.3"}, ["density='0.3'", "(0, 1]"]),
        ({"density": True}, ["density=True", "(0, 1]"]),
        ({"density": float("nan")}, ["density=nan", "(0, 1]"]),
        ({"k": True}, ["k=True", "whole number"]),
        ({"k": 0}, ["k=0", "at least 1"]),
        ({"train_bias": 1}, ["train_bias=1", "True or False"]),
        ({"bias": "gps_only"}, ["bias='gps_only'", "psn_only"]),
    ],
)
def test_error_names_argument_value_and_remedy(options, words):
    with pytest.raises(ValueError) as error:
        PSNConfig(**options)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, str(error.value)
