"""How fused experts are named, and what is said of those that can't be adapted."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_ext import NeuroAdaConfig, PSNConfig
from tests._models.experts import MODELS, fill, layers_of, run, tiny, token_ids


EXPERTS = "model.layers.{}.mlp.experts.{}_proj"
BOTH = {EXPERTS.format(0, "gate_up"), EXPERTS.format(0, "down")}
IDS = token_ids()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, BOTH),
        ({"target_modules": "all-linear"}, BOTH),
        ({"target_modules": "all-neurons"}, BOTH),
        ({"target_modules": ["experts"]}, BOTH),
        ({"target_modules": ["gate_up_proj", "q_proj"]}, {EXPERTS.format(0, "gate_up")}),
        ({"target_modules": ["experts.down_proj"]}, {EXPERTS.format(0, "down")}),
        ({"target_modules": r".*\.(down|q)_proj"}, {EXPERTS.format(0, "down")}),
        ({"target_modules": r".*\.experts"}, BOTH),
        ({"target_parameters": ["experts.gate_up_proj"]}, {EXPERTS.format(0, "gate_up")}),
        ({"target_parameters": ["mlp.experts.gate_up_proj", "down_proj"]}, BOTH),
        ({"target_parameters": ["down_proj"], "target_modules": ["q_proj"]}, {EXPERTS.format(0, "down")}),
        ({"exclude_modules": ["experts"]}, set()),
        ({"exclude_modules": ["gate_up_proj"]}, {EXPERTS.format(0, "down")}),
        ({"exclude_modules": r".*\.experts\.down_proj"}, {EXPERTS.format(0, "gate_up")}),
        ({"target_modules": ["experts"], "exclude_modules": ["down_proj"]}, {EXPERTS.format(0, "gate_up")}),
    ],
    ids=lambda value: " ".join(sorted(value)) if isinstance(value, set) else str(value),
)
@pytest.mark.filterwarnings("error:You have passed exclude_modules")
def test_names(options, expected, tmp_path):
    model = fill(get_peft_model(tiny(), NeuroAdaConfig(**options)).eval())
    assert {name for name in layers_of(model) if "experts" in name} == expected
    if options.get("target_parameters") and not options.get("target_modules"):
        assert set(layers_of(model)) == expected
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert layers_of(loaded).keys() == layers_of(model).keys()
    assert torch.equal(run(loaded, input_ids=IDS), run(model, input_ids=IDS))


@pytest.mark.parametrize("options", [{}, {"target_modules": ["experts"]}, {"target_modules": ["down_proj"]}], ids=str)
def test_some_blocks(options):
    model = get_peft_model(tiny(num_hidden_layers=2), NeuroAdaConfig(layers_to_transform=[1], **options))
    names = {name for name in layers_of(model) if "experts" in name}
    banks = ["down"] if "down_proj" in str(options) else ["gate_up", "down"]
    assert names == {EXPERTS.format(1, bank) for bank in banks}


def test_other_methods():
    model = get_peft_model(tiny(), PSNConfig(density=0.25, target_modules=["experts"]))
    entries = {name: layer.deltas["default"].support.entries for name, layer in layers_of(model).items()}
    assert entries == {EXPERTS.format(0, "gate_up"): 4 * 48 * 4, EXPERTS.format(0, "down"): 4 * 16 * 6}


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_that_left_experts_out_is_loaded_without_them(name, tmp_path):
    """As one made by a version that did not adapt them, whose config may name layers like a weight of theirs."""
    targets = ["o_proj", "down_proj"] if name in ("deepseek_v3", "llama4_text") else ["o_proj"]
    base = tiny(name)
    model = fill(get_peft_model(base, NeuroAdaConfig(target_modules=targets, exclude_modules=["experts"])).eval())
    model.peft_config["default"].exclude_modules = None
    assert not [key for key in layers_of(model) if ".experts." in key] and len(layers_of(model)) == len(targets)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(name), tmp_path)
    assert torch.equal(run(loaded, input_ids=IDS), run(model, input_ids=IDS))


def test_parameters_that_are_not_there():
    for wanted in (["experts.w1"], ["q_proj.weight"]):
        base = tiny()
        with pytest.raises(ValueError, match=r"target_parameters=.*is no weight of fused experts.*target_modules"):
            get_peft_model(base, NeuroAdaConfig(target_parameters=wanted))
        assert not layers_of(base)


class Packed(nn.Module):
    """As quantisers leave them."""

    def __init__(self, dtype):
        super().__init__()
        self.num_experts, self.is_transposed = 4, False
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 48, 16).to(dtype), requires_grad=False)
        self.down_proj = nn.Parameter(torch.zeros(4, 16, 24).to(dtype), requires_grad=False)


class UnknownExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts = 4
        self.weight = nn.Parameter(torch.zeros(4, 48, 16))


@pytest.mark.parametrize("kind", ["8 bits", "packed", "unknown"])
def test_experts_that_cannot_be_adapted_are_named(kind):
    class PackedExperts(Packed):
        pass

    kinds = {
        "8 bits": lambda: PackedExperts(torch.float8_e4m3fn),
        "packed": lambda: PackedExperts(torch.uint8),
        "unknown": UnknownExperts,
    }

    def base():
        model = tiny()
        model.model.layers[0].mlp.experts = kinds[kind]()
        return model

    for targets in (None, "all-linear", "all-neurons"):
        with pytest.warns(UserWarning, match=r"Experts \('model.layers.0.mlp.experts'\) is left out"):
            model = get_peft_model(base(), NeuroAdaConfig(target_modules=targets))
        assert not [name for name in layers_of(model) if "experts" in name]
    with pytest.raises(TypeError, match="'model.layers.0.mlp.experts' is a .*Experts, which is not supported"):
        get_peft_model(base(), NeuroAdaConfig(target_modules=["experts"]))
    if kind != "unknown":
        with pytest.raises(TypeError, match="'gate_up_proj' is no module here.*can't be adapted"):
            get_peft_model(base(), NeuroAdaConfig(target_modules=["gate_up_proj"]))


def test_the_text_model_alone():
    """Without a head, where names begin otherwise."""
    base = AutoModelForCausalLM.from_config(tiny().config).model
    model = get_peft_model(base, NeuroAdaConfig())
    assert "layers.0.mlp.experts.gate_up_proj" in layers_of(model)


def test_names_that_peft_shortens_stay_those_of_the_same_weights(tmp_path):
    """It makes a short list of a long one that names the same modules, and a weight of experts is none."""
    base = tiny("deepseek_v3", num_hidden_layers=3)
    shared = [name for name, _ in base.named_modules() if "shared_experts." in name and name.endswith("_proj")]
    others = [name for name, _ in base.named_modules() if "self_attn." in name and name.endswith("_proj")]
    assert len(shared + others) >= 20
    model = get_peft_model(base, NeuroAdaConfig(target_modules=shared + others))
    assert set(layers_of(model)) == {*shared, *others}
    model.add_adapter("again", model.peft_config["default"])  # as DPO's trainer does for its reference
    for layer in layers_of(model).values():
        assert set(layer.deltas) == {"default", "again"}
