"""Options: what is refused, how many numbers are trained, and which models are."""

import json

import pytest
import torch
import transformers as hf
from peft import PeftConfig, get_peft_model
from torch import nn

from peft_ext import MoReSConfig
from tests._models.vision_language import build, llava, text_config
from tests.contract._untouched import Untouched
from tests.tuners.mores._common import layers_of


REFUSED = {
    "rank": ({"rank": 0}, "rank=0 must be"),
    "rank type": ({"rank": 1.5}, "rank=1.5 must be"),
    "ratio": ({"token_ratio": 0.0}, "token_ratio=0.0 must be"),
    "percent": ({"token_ratio": 25}, "token_ratio=25 must be"),
    "ratio is a switch": ({"token_ratio": True}, "token_ratio=True must be"),
    "no ratio": ({"token_ratio": float("nan")}, "token_ratio=nan must be"),
    "seed": ({"seed": 1.5}, "seed=1.5 must be"),
    "tied": ({"tie_projections": "no"}, "tie_projections='no' must be"),
    "bias": ({"steering_bias": None}, "steering_bias=None must be"),
    "selection": ({"token_selection": "best"}, "token_selection='best'.*uniform"),
    "grouping": ({"token_grouping": "row"}, "token_grouping='row'.*sample"),
    "positions": ({"token_positions": "7"}, "token_positions='7'"),
    "layers": ({"layers_to_transform": "last"}, "layers_to_transform='last'"),
    "positions type": ({"token_positions": 7}, "token_positions=7"),
    "layer type": ({"layers_to_transform": 1.0}, "layers_to_transform=1.0"),
    "layer list": ({"layers_to_transform": []}, "layers_to_transform=\\[\\]"),
    "dropout": ({"dropout": 1.0}, "dropout=1.0"),
    "init": ({"init": "zero"}, "init='zero'.*identity"),
    "connector": ({"connector": True}, "connector=True.*frozen"),
    "site": ({"site": "embeddings"}, "site='embeddings'.*connector"),
    "site with a ratio": ({"site": "connector"}, "token_ratio=1.0"),
    "site with layers": ({"site": "connector", "token_ratio": 1.0, "layers_to_transform": [0]}, "no meaning"),
    "site with text": ({"site": "connector", "token_ratio": 1.0, "token_positions": "f1"}, "do not pass"),
    "site and connector": ({"site": "connector", "token_ratio": 1.0, "connector": "train"}, "choose one"),
    "regex": ({"target_modules": ".*layers.*"}, "finds the decoder layers itself"),
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED.keys())
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MoReSConfig(**options)


def test_default_options_are_the_papers():
    config = MoReSConfig()
    assert (config.rank, config.token_ratio, config.token_selection) == (1, 0.01, "ends")


def test_options_survive_the_file(tmp_path):
    config = MoReSConfig(rank=3, token_ratio=0.5, layers_to_transform=[0, -1], token_positions="f7+l7", seed=4)
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is MoReSConfig
    assert {**again.to_dict(), "peft_ext_version": None} == {**config.to_dict(), "peft_ext_version": None}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MORES"


# Text models of the paper's three sizes (Phi-2, Vicuna 7B and 13B), on the meta device.
SIZES = {
    "3B": (
        hf.PhiConfig(hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32),
        0.164,
    ),
    "7B": (hf.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32), 0.262),
    "13B": (
        hf.LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
        0.410,
    ),
}


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("text, millions", SIZES.values(), ids=SIZES.keys())
def test_numbers_trained_are_the_papers(text, millions, rank):
    with torch.device("meta"):
        model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(text_config=text, image_token_id=60))
    model = get_peft_model(model, MoReSConfig(rank=rank, layers_to_transform="all"))
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    biases = sum(number for name, number in trained.items() if name.endswith(".bias"))
    layers, size = text.num_hidden_layers, text.hidden_size
    assert sum(trained.values()) - biases == 2 * size * rank * layers
    assert biases == rank * layers
    assert round((sum(trained.values()) - biases) / rank / 1e6, 3) == millions
    assert not [name for name, _ in model.named_buffers() if "mores" in name]


def test_the_last_layer_is_left_out_by_default():
    model = get_peft_model(build(), MoReSConfig())
    assert list(layers_of(model)) == [f"model.language_model.layers.{number}" for number in (0, 1)]


@pytest.mark.parametrize(
    "layers, expected",
    [(0, [0]), (-1, [2]), ([0, 2], [0, 2]), ((0, 2), [0, 2]), ({-1}, [2]), ("all", [0, 1, 2])],
    ids=str,
)
def test_layers_by_number(layers, expected):
    model = get_peft_model(build(), MoReSConfig(layers_to_transform=layers))
    assert list(layers_of(model)) == [f"model.language_model.layers.{number}" for number in expected]


def test_many_layers_keep_their_full_names():
    """PEFT shortens lists of twenty names and more."""
    model = get_peft_model(llava(num_hidden_layers=25), MoReSConfig())
    assert len(layers_of(model)) == len(model.peft_config["default"].target_modules) == 24
    assert all(name.startswith("model.language_model.layers.") for name in model.peft_config["default"].target_modules)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layers_to_transform": 3}, "layers_to_transform has 3.*3 layers"),
        ({"rank": 33}, "rank=33 is larger than the hidden size, 32"),
        ({"target_modules": ["lm_head"]}, "'lm_head'.*no place that MoReS can steer"),
    ],
    ids=["layer", "rank", "target"],
)
def test_options_that_do_not_fit_the_model_are_refused(options, message):
    base = build()
    with Untouched(base), pytest.raises(ValueError, match=message):
        get_peft_model(base, MoReSConfig(**options))


def _one_layer():
    return llava(num_hidden_layers=1)


def _mllama():
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "cross_attention_layers": [1], "vocab_size": 64, "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "image_size": 16, "patch_size": 4, "intermediate_layers_indices": [0]}
    vision |= {"vision_output_dim": 32, "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}
    return hf.MllamaForConditionalGeneration(hf.MllamaConfig(vision_config=vision, text_config=text))


def _t5():
    return hf.T5ForConditionalGeneration(hf.T5Config(d_model=16, d_ff=24, num_layers=1, num_heads=2, vocab_size=64))


UNSUPPORTED = {
    "not transformers": (lambda: nn.Sequential(nn.Linear(2, 2)), "not a transformers model"),
    "text model": (lambda: hf.LlamaForCausalLM(text_config()), "no visual tokens.*token_positions"),
    "one layer": (_one_layer, "one decoder layer"),
    "cross attention": (_mllama, "cross-attention layers \\[1\\]"),
    "encoder-decoder": (_t5, "encoder-decoder"),
    "no list of layers": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2)), "no `layers`"),
}


@pytest.mark.parametrize("make, message", UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_unsupported_models_are_refused_by_name_of_what_is_missing(make, message):
    base = make()
    with Untouched(base), pytest.raises(ValueError, match=message):
        get_peft_model(base, MoReSConfig())


def test_a_model_without_a_connector():
    base = hf.LlamaForCausalLM(text_config())
    for options in ({"site": "connector", "token_ratio": 1.0}, {"connector": "train", "token_positions": "l1"}):
        with Untouched(base), pytest.raises(ValueError, match="no connector was found"):
            get_peft_model(base, MoReSConfig(**options))
