"""The options: what they accept, what they refuse and how, and that a file keeps them."""

import json
import math

import pytest
from peft import PeftConfig

from peft_ext import NeuroAdaConfig


OPTIONS = [
    {},
    {"k": 20, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["lm_head"]},
    {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*\.0\..*"},
    {"target_modules": "all-linear", "selection": "magnitude_network", "support_sizes": {"a.b": 3, "a.c": 0}},
    {"selection": "random", "neuron_ratio": 0.25, "seed": 7},
    {"selection": "gradient", "backend": "folded", "values_dtype": "bfloat16", "bias": "neuroada_only"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    {"modules_to_save": ["classifier"], "bias": "all", "init_weights": False, "task_type": "SEQ_CLS"},
    {"trainable_token_indices": {"embed_tokens": [1, 2]}, "backend": "reference", "values_dtype": "float16"},
    {"target_modules": ["q_proj"], "layers_to_transform": 1, "inference_mode": True, "revision": "main"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reader", [NeuroAdaConfig, PeftConfig])
def test_file_keeps_every_option(options, reader, tmp_path):
    config = NeuroAdaConfig(**options)
    config.save_pretrained(str(tmp_path))
    loaded = reader.from_pretrained(str(tmp_path))
    assert type(loaded) is NeuroAdaConfig
    assert loaded.peft_ext_version is not None and config.peft_ext_version is None  # the file names what wrote it
    loaded.peft_ext_version = None
    assert loaded == config


@pytest.mark.parametrize("options", OPTIONS)
def test_dict_keeps_every_option(options):
    config = NeuroAdaConfig(**options)
    assert PeftConfig.from_peft_type(**{**config.to_dict(), "peft_ext_version": None}) == config


def test_defaults_are_the_paper():
    config = NeuroAdaConfig()
    assert (config.k, config.selection, config.neuron_ratio, config.init_weights) == (1, "magnitude", 1.0, True)
    assert (config.backend, config.values_dtype, config.bias) == ("auto", None, "none")


def test_file_is_readable_by_people_and_says_what_loads_it(tmp_path):
    NeuroAdaConfig(target_modules=["v_proj", "q_proj"]).save_pretrained(str(tmp_path))
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["target_modules"] == ["q_proj", "v_proj"]  # sorted: two saves do not differ
    assert content["peft_type"] == "NEUROADA"
    assert "pip install peft-ext" in content["requires"] and "import peft_ext" in content["requires"]


def test_scores_stay_out_of_the_file(tmp_path):
    import torch

    config = NeuroAdaConfig(selection="gradient").with_scores({"a": torch.ones(2, 2)})
    assert isinstance(config, NeuroAdaConfig)
    config.save_pretrained(str(tmp_path))
    assert "scores" not in json.loads((tmp_path / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, ["k=0", "at least 1"]),
        ({"k": -3}, ["k=-3", "at least 1"]),
        ({"k": True}, ["k=True", "whole number"]),
        ({"k": 2.0}, ["k=2.0", "whole number"]),
        ({"k": "1"}, ["k='1'", "whole number"]),
        ({"k": None}, ["k=None", "whole number"]),
        ({"target_modules": []}, ["target_modules=[]", "name modules"]),
        ({"target_modules": set()}, ["target_modules=", "name modules"]),
        ({"target_modules": ""}, ["target_modules=''", "name modules"]),
        ({"selection": "largest"}, ["selection='largest'", "magnitude", "random", "gradient"]),
        ({"selection": "magnitude_neuron"}, ["selection='magnitude_neuron'", "magnitude_layer"]),
        ({"backend": "sparse"}, ["backend='sparse'", "auto", "bypass", "folded", "dense", "reference"]),
        ({"values_dtype": "fp16"}, ["values_dtype='fp16'", "float32", "bfloat16", "float16"]),
        ({"values_dtype": "int8"}, ["values_dtype='int8'", "float32"]),
        ({"bias": "lora_only"}, ["bias='lora_only'", "none", "all", "neuroada_only"]),
        ({"bias": True}, ["bias=True", "none"]),
        ({"neuron_ratio": 0.0}, ["neuron_ratio=0.0", "(0, 1]"]),
        ({"neuron_ratio": -0.5}, ["neuron_ratio=-0.5", "(0, 1]"]),
        ({"neuron_ratio": 1.5}, ["neuron_ratio=1.5", "(0, 1]"]),
        ({"neuron_ratio": math.nan}, ["neuron_ratio=nan", "(0, 1]"]),
        ({"neuron_ratio": True}, ["neuron_ratio=True", "(0, 1]"]),
        ({"seed": True}, ["seed=True", "whole number"]),
        ({"seed": 1.0}, ["seed=1.0", "whole number"]),
        ({"layers_to_transform": True}, ["layers_to_transform=True", "number"]),
        ({"layers_to_transform": [0, True]}, ["layers_to_transform=[0, True]", "number"]),
        ({"layers_to_transform": "0"}, ["layers_to_transform='0'", "number"]),
        ({"modules_to_save": "classifier"}, ["modules_to_save='classifier'", "list"]),
        ({"target_modules": 3}, ["target_modules=3", "list", "regular expression"]),
        ({"target_modules": ["q_proj", 3]}, ["target_modules=['q_proj', 3]", "list"]),
        ({"target_modules": "(q_proj"}, ["target_modules='(q_proj'", "list"]),
        ({"exclude_modules": True}, ["exclude_modules=True", "list"]),
        ({"target_parameters": "experts.down_proj"}, ["target_parameters='experts.down_proj'", "list of names"]),
        ({"experts_to_transform": 1}, ["experts_to_transform=1", "list of experts' numbers"]),
        ({"experts_to_transform": {"mlp.experts": 1}}, ["experts_to_transform={'mlp.experts': 1}", "list of experts"]),
        ({"neuron_ratio": 0.5, "selection": "random_network"}, ["neuron_ratio=0.5", "random_network", "per neuron"]),
        ({"layers_pattern": "layers"}, ["layers_pattern='layers'", "layers_to_transform"]),
        (
            {"target_modules": ".*q_proj", "layers_to_transform": [0]},
            ["layers_to_transform=[0]", "target_modules", "list"],
        ),
        (
            {"target_modules": ".*q_proj", "layers_pattern": "h"},
            ["layers_pattern='h'", "target_modules", "list"],
        ),
    ],
)
def test_error_names_argument_value_and_remedy(options, words):
    with pytest.raises(ValueError) as error:
        NeuroAdaConfig(**options)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, str(error.value)


def test_saving_over_a_file_is_refused(tmp_path):
    path = tmp_path / "adapter"
    path.write_text("mine")
    with pytest.raises(ValueError, match="adapter' is a file; pass a folder"):
        NeuroAdaConfig().save_pretrained(str(path))
    assert path.read_text() == "mine"
