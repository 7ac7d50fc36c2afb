"""Counts of trained parameters against the paper's tables, and what each method trains."""

import json

import pytest
import torch
from _factory.check import compose
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, PhiConfig

from peft_ext.cli import main
from peft_ext.factory import LlavaFactoryConfig, Method, load
from peft_ext.factory.methods import LEARNING_RATES
from peft_ext.factory.parts import adapt, counts, prepare, trained_by_part


VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def _llama(size, inner, layers):
    return LlamaConfig(hidden_size=size, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=32)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Configurations of the paper's three models."""
    folder = tmp_path_factory.mktemp("models")
    phi = PhiConfig(hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32)
    vision = CLIPVisionConfig(**VISION)
    LlavaFactoryConfig(vision_config=vision, text_config=phi, lm_head_bias=True).save_pretrained(folder / "3B")
    for name, text in {"7B": _llama(4096, 11008, 32), "13B": _llama(5120, 13824, 40)}.items():
        LlavaConfig(vision_config=vision, text_config=text).save_pretrained(folder / name)
    return folder


# The column TP of tables 1 and 2, in millions.
PAPER = {
    "3B": {"full": 2780, "lora-128": 188.74, "ia3": 0.492, "mores-b": 0.164, "mores-l": 0.328, "mores-h": 0.655},
    "7B": {"lora-128": 319.8, "ia3": 0.614, "mores-b": 0.262},
    "13B": {"lora-128": 500.7, "ia3": 0.963, "mores-b": 0.410},
}


@pytest.mark.parametrize("size", PAPER)
def test_trained_parameters_are_the_papers(models, size):
    found = counts(str(models / size), list(PAPER[size]))
    for method, expected in PAPER[size].items():
        digits = 0 if expected > 2000 else 2 if expected == 188.74 else 1 if expected > 100 else 3
        millions = found[method]["language_model"] / 1e6
        assert round(millions, digits) == expected or abs(millions / expected - 1) < 2e-4, (method, millions)


@pytest.mark.parametrize(
    "size, width, layers, paper", [("3B", 2560, 32, 39.32), ("7B", 4096, 32, 100.7), ("13B", 5120, 40, 196.6)]
)
def test_oft_trains_half_of_the_papers_numbers(models, size, width, layers, paper):
    """The paper counts whole blocks; PEFT now trains what makes one orthogonal, the part above the diagonal."""
    block, ours = width // 16, counts(str(models / size), ["oft"])["oft"]["language_model"]
    assert ours == layers * 3 * 16 * block * (block - 1) // 2
    assert layers * 3 * 16 * block**2 / 1e6 == pytest.approx(paper, abs=0.06)


def test_methods_without_a_count_in_the_paper(models):
    found = counts(str(models / "3B"), ["bitfit", "loreft-8", "neuroada-1"])
    layer = 4 * 2560 + 10240 + 2560 + 2560  # attention, feed-forward and norm
    assert found["bitfit"]["language_model"] == 32 * layer + 2560 + 51200
    assert found["loreft-8"]["language_model"] == 32 * (2 * 2560 * 8 + 8)
    assert found["neuroada-1"]["language_model"] == 32 * (4 * 2560 + 10240 + 2560)


def test_the_command_counts(models, capsys):
    command = ["llava", "methods", "--model", str(models / "7B"), "--methods", "lora", "mores-b"]
    assert main(command) == 0
    assert "language_model 319,815,680" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lora"]["language_model"] == 319_815_680


@pytest.mark.parametrize(
    "name, number",
    [("lora-4", None), ("ia3", None), ("oft-8", None), ("neuroada-1", None), ("mores-2@25", 5 * (4 * 64 + 2))],
)
def test_adapters_adapt_the_language_model_alone(composed_shapes, name, number):
    model = adapt(load(str(composed_shapes / "composed")).model, name)
    parts = trained_by_part(model)
    assert parts["language_model"] == model.num_parameters(only_trainable=True) > 0
    assert number is None or model.num_parameters(only_trainable=True) == number


def test_an_adapter_of_any_type_in_both_parts(composed_shapes):
    model = load(str(composed_shapes / "composed")).model
    chosen = {"peft_type": "LOHA", "r": 2}
    parts = trained_by_part(prepare(model, chosen, "frozen", chosen))
    assert parts["vision_tower"] > 0 and parts["language_model"] > 0 and parts["connector"] == 0


def test_of_a_linear_connector_the_identity_stays():
    composed = compose("Llama", "CLIP", "linear")
    model = prepare(composed.model, "frozen", "full", "lora-2")
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "projector" in name]
    assert trained and all("linear_1" in name for name in trained)


@pytest.mark.parametrize(
    "name, message",
    [
        ("adapter", "PEFT has no bottleneck adapters"),
        ("mores-0@1", "mores-<rank>"),
        ("mores-1@101", "mores-<rank>"),
        ("full-3", "mores-<rank>"),
        ("lora-8@5", "mores-<rank>"),
        ({"peft_type": "LARO"}, "names no `peft_type`"),
    ],
)
def test_unknown_methods_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        Method.parse(name)


def test_layers_that_a_method_needs_are_named(composed_shapes):
    model = load(str(composed_shapes / "composed")).model
    with pytest.raises(ValueError, match="bitfit trains biases, and the language_model"):
        prepare(model, "frozen", "frozen", "bitfit")
    with pytest.raises(ValueError, match="no linear layers called down_proj or fc2 .*c_attn"):
        prepare(compose("GPT-2", "CLIP", "linear").model, "frozen", "frozen", "ia3")
    with pytest.raises(ValueError, match="is no Llava"):
        prepare(torch.nn.Linear(2, 2), "frozen", "full", "frozen")


def test_rates_are_llavas():
    assert Method.parse("full").learning_rate == LEARNING_RATES["full"] == 2e-5
    assert Method.parse("mores-b").learning_rate == Method.parse("lora").learning_rate == 2e-4
