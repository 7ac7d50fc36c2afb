"""What `target_modules` stands for, and which layers are refused."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import ConvNextConfig, ConvNextForImageClassification, ResNetConfig, ResNetForImageClassification

from peft_ext import NeuroAdaConfig
from peft_ext.sparse.layers import SparseConv, SparseLayer
from tests._models.experts import tiny as mixture
from tests.contract._untouched import Untouched


def _convnext():
    config = ConvNextConfig(
        num_channels=1, patch_size=2, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, image_size=16
    )
    return ConvNextForImageClassification(config)


def _resnet():
    config = ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3)
    return ResNetForImageClassification(config)


def _adapted_names(model):
    return {name for name, module in model.base_model.model.named_modules() if isinstance(module, SparseLayer)}


@pytest.mark.parametrize("build", [_convnext, _resnet])
def test_all_neurons_are_those_of_linear_layers_and_convolutions_without_the_head(build):
    base = build().eval()
    expected = {
        name
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not name.startswith("classifier")
    }
    model = get_peft_model(base, NeuroAdaConfig(k=2, target_modules="all-neurons")).eval()
    assert _adapted_names(model) == expected
    assert any(isinstance(module, SparseConv) for module in model.modules())
    x = torch.randn(2, 1, 16, 16)
    model(pixel_values=x, labels=torch.tensor([0, 2])).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad.abs().max() > 0 for parameter in trained)
    again = get_peft_model(build(), model.peft_config["default"])
    assert _adapted_names(again) == expected
    model.add_adapter("other", NeuroAdaConfig(target_modules="all-neurons"))
    assert all("other" in module.deltas for module in model.modules() if isinstance(module, SparseLayer))


class Plain(nn.Module):
    """No model of transformers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.classifier = nn.Linear(4, 2)
        self.head = nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": "all-neurons"}, {"attention", "classifier", "conv", "head"}),
        ({"target_modules": "all-neurons", "modules_to_save": ["head"]}, {"attention", "classifier", "conv"}),
        ({"target_modules": "all-neurons", "exclude_modules": ["attention", "head"]}, {"classifier", "conv"}),
        ({"target_modules": "all-linear"}, {"attention", "classifier", "head"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",  # sets have no order
)
def test_shorthands_on_a_plain_model_take_an_attention_as_a_whole(options, expected):
    """PEFT finds its output projection, which nobody calls, and not its others."""
    model = get_peft_model(Plain(), NeuroAdaConfig(**options))
    if "attention" in expected:
        parts = {f"attention.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")}
        expected = expected - {"attention"} | parts
    assert _adapted_names(model) == expected
    model.add_adapter("other", NeuroAdaConfig(**options))
    assert all("other" in module.deltas for module in model.modules() if isinstance(module, SparseLayer))


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(x) @ self.proj.weight


@pytest.mark.parametrize("targets", ["all-linear", "all-neurons"])
def test_layers_that_are_left_out_may_have_names_that_end_like_those_of_others(targets, tmp_path):
    """PEFT takes `0` for `1.0` as well."""
    left_out = nn.Sequential(nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    base = nn.ModuleDict({"0": nn.Linear(4, 4), "proj": nn.Linear(4, 4), "1": left_out, "reads": Reads()})
    model = get_peft_model(copy.deepcopy(base), NeuroAdaConfig(target_modules=targets))
    assert _adapted_names(model) == {"0", "proj", "reads.last"}
    model.save_pretrained(tmp_path)
    assert _adapted_names(PeftModel.from_pretrained(base, tmp_path)) == {"0", "proj", "reads.last"}


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class OnlyNamed(nn.Conv2d):
    """Computes what its base class does."""


@pytest.mark.parametrize("kind", [Standardised, nn.ConvTranspose2d, nn.Bilinear, nn.Embedding, nn.LayerNorm])
def test_unsupported_layers_are_named_with_what_is_supported(kind):
    layer = kind(*{nn.Embedding: (2, 2), nn.LayerNorm: (2,)}.get(kind, (2, 2, 3)))
    with pytest.raises(TypeError) as error:
        get_peft_model(nn.Sequential(layer), NeuroAdaConfig(target_modules=["0"]))
    for word in ("'0'", kind.__name__, "Conv3d", "MultiheadAttention", "Conv1D", "exclude_modules"):
        assert word in str(error.value)


def test_a_subclass_that_computes_the_same_is_supported():
    model = get_peft_model(nn.Sequential(OnlyNamed(2, 2, 3)), NeuroAdaConfig(target_modules=["0"]))
    assert isinstance(model.base_model.model[0], SparseConv)


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "w1", "w2", "w3"], ["w2"], r".*\.w[13]", ["experts.0.w3"]],
    ids=str,
)
def test_a_layer_that_is_fused_into_a_parameter_is_refused_and_the_parameter_named(targets):
    """They are called so in checkpoints, where each expert has its own."""
    model = mixture()
    with Untouched(model), pytest.raises(TypeError) as error:
        get_peft_model(model, NeuroAdaConfig(target_modules=targets))
    for word in ("target_modules=", ".experts.", "4x", "fuses the weights of all experts. Name '"):
        assert word in str(error.value)


def test_a_regular_expression_for_layers_and_experts_says_that_it_gets_the_layers_only():
    with pytest.warns(UserWarning, match="only the layers.*not the experts'"):
        adapted = get_peft_model(mixture(), NeuroAdaConfig(target_modules=r".*\.(q_proj|w1)"))
    assert {name.rpartition(".")[2] for name in _adapted_names(adapted)} == {"q_proj"}


def test_a_name_of_a_layer_may_be_that_of_a_parameter_elsewhere():
    """In Qwen's models `down_proj` is a layer of the shared expert and a fused parameter of the others."""
    model = nn.ModuleDict({"shared": nn.ModuleDict({"down_proj": nn.Linear(4, 4)}), "experts": nn.Module()})
    model["experts"].down_proj = nn.Parameter(torch.zeros(2, 4, 4))
    with pytest.warns(UserWarning, match="'down_proj'.*not the experts'"):
        adapted = get_peft_model(model, NeuroAdaConfig(target_modules=["down_proj"]))
    assert _adapted_names(adapted) == {"shared.down_proj"}


def test_names_that_stand_for_nothing_are_named(tmp_path):
    """As typing errors do, and the names that other architectures have."""
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    with pytest.warns(
        UserWarning, match=r"target_modules=\['query', 'value'\]: ModuleDict has no modules of this name"
    ):
        adapted = get_peft_model(model, NeuroAdaConfig(target_modules=["q_proj", "value", "query"]))
    assert _adapted_names(adapted) == {"q_proj"}
    adapted.save_pretrained(tmp_path)
    PeftModel.from_pretrained(nn.ModuleDict({"q_proj": model["q_proj"].base_layer}), tmp_path)  # said once


@pytest.mark.parametrize("shape", [(0, 4), (16, 0)], ids=str)
def test_layers_without_weights_are_left_out_or_refused_by_name(shape):
    for targets in ("all-linear", "all-neurons"):
        model = nn.Sequential(nn.Linear(*shape), nn.Linear(4, 4))
        assert _adapted_names(get_peft_model(model, NeuroAdaConfig(target_modules=targets))) == {"1"}
    model = nn.Sequential(nn.Linear(*shape), nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"'0' is a Linear with an empty weight.*exclude_modules"):
        get_peft_model(model, NeuroAdaConfig(target_modules=["0", "1"]))
    assert type(model[1]) is nn.Linear


@pytest.mark.parametrize("selection", ["magnitude", "random"])
def test_complex_weights_are_refused(selection):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.complex64))
    for targets in (["0", "1"], "all-linear"):
        with pytest.raises(TypeError, match=r"'1' is torch.complex64.*real floating-point.*exclude_modules"):
            get_peft_model(model, NeuroAdaConfig(target_modules=targets, selection=selection))
    assert type(model[0]) is nn.Linear


def test_an_embedding_is_refused_with_the_way_to_train_tokens(tiny):
    with pytest.raises(TypeError, match="embed_tokens' is a Embedding.*trainable_token_indices"):
        get_peft_model(tiny("llama"), NeuroAdaConfig(target_modules=["embed_tokens"]))
