"""Putting adapters into a model: which modules, what stays as it was, what is refused before anything is touched."""

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from peft.utils import ModulesToSaveWrapper
from torch import nn

from peft_ext import MoReSConfig, NeuroAdaConfig
from tests.contract._common import fill, layers_of
from tests.contract._untouched import Untouched
from tests.tuners.neuroada._common import HALF_TYPES, SEVEN, logits


BACKENDS = ["auto", "bypass", "folded", "dense", "reference"]


# ------------------------------------------------------------------ identity at the start


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_new_adapter_changes_no_bit_of_the_output(tiny, inputs_of, name, backend, dtype):
    model, inputs = tiny(name, dtype), inputs_of(name, dtype)
    expected = model(**inputs).logits
    model = get_peft_model(model, NeuroAdaConfig(k=2, backend=backend)).eval()
    assert layers_of(model)
    with_gradients = model(**inputs).logits
    assert with_gradients.requires_grad
    assert torch.equal(with_gradients, expected)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)


def test_random_start_changes_the_output(llama, ids):
    expected = logits(llama, ids)
    assert not torch.equal(logits(get_peft_model(llama, NeuroAdaConfig(init_weights=False)).eval(), ids), expected)


def test_one_forward_trains_every_value_and_nothing_else(llama, ids):
    model = get_peft_model(llama, NeuroAdaConfig(k=2))
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if "neuroada_delta" in name:
            assert parameter.grad is not None and parameter.grad.any(), name
        else:
            assert not parameter.requires_grad and parameter.grad is None, name


# ------------------------------------------------------------------ which modules


def _targets(base, **options):
    model = get_peft_model(base, NeuroAdaConfig(**options))
    return {name.removeprefix("base_model.model.") for name in layers_of(model)}


def _linears(*suffixes, blocks=(0, 1)):
    parts = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn"}
    return {f"model.layers.{block}.{parts.get(name, 'mlp')}.{name}" for block in blocks for name in suffixes}


ATTENTION = _linears("q_proj", "k_proj", "v_proj", "o_proj")
OF_LLAMA = {
    "default": ({}, _linears(*SEVEN)),
    "all-linear": ({"target_modules": "all-linear"}, _linears(*SEVEN)),
    "suffixes": ({"target_modules": ["q_proj", "down_proj"]}, _linears("q_proj", "down_proj")),
    "regex": ({"target_modules": r".*\.1\..*\.(k|up)_proj"}, _linears("k_proj", "up_proj", blocks=[1])),
    "without a list": (
        {"target_modules": "all-linear", "exclude_modules": ["gate_proj", "up_proj", "down_proj"]},
        ATTENTION,
    ),
    "without a regex": ({"target_modules": "all-linear", "exclude_modules": r".*mlp\..*"}, ATTENTION),
    **{
        f"a block, layers_pattern={pattern}": (
            {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": pattern},
            _linears("q_proj", blocks=[1]),
        )
        for pattern in (None, "layers", ["layers"])
    },
}


@pytest.mark.parametrize(("options", "expected"), OF_LLAMA.values(), ids=OF_LLAMA)
def test_targets(llama, options, expected):
    assert _targets(llama, **options) == expected


def test_default_covers_conv1d(tiny):
    targets = _targets(tiny("gpt2"))
    assert {name.rpartition(".")[2] for name in targets} == {"c_attn", "c_proj", "c_fc"}
    assert len(targets) == 8


def test_k_larger_than_the_fan_in_is_capped(llama):
    for layer in layers_of(get_peft_model(llama, NeuroAdaConfig(k=100))).values():
        k = min(100, layer.in_features)
        assert layer.neuroada_delta["default"].weight.shape == (layer.out_features, k)


def test_unknown_names_are_an_error(llama):
    with Untouched(llama), pytest.raises(ValueError, match="Target modules .*nonsense.* not found"):
        get_peft_model(llama, NeuroAdaConfig(target_modules=["nonsense"]))


def test_a_model_that_is_not_of_transformers_must_name_its_targets():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with Untouched(model), pytest.raises(ValueError, match="specify `target_modules`"):
        get_peft_model(model, NeuroAdaConfig())


# ------------------------------------------------------------------ what else is trained


def _trainable(model):
    return {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("bias", "layer_norm_too"), [("all", True), ("neuroada_only", False)])
def test_biases(tiny, bias, layer_norm_too):
    base = tiny("bert")
    assert not [n for n in _trainable(get_peft_model(tiny("bert"), NeuroAdaConfig(k=1))) if n.endswith("bias")]
    config = NeuroAdaConfig(k=1, target_modules=["query"], bias=bias)
    biases = {name for name in _trainable(get_peft_model(base, config)) if name.endswith(".bias")}
    assert "bert.encoder.layer.0.attention.self.query.base_layer.bias" in biases
    assert ("bert.encoder.layer.0.output.LayerNorm.bias" in biases) == layer_norm_too


def test_modules_to_save(tiny):
    model = get_peft_model(tiny("bert"), NeuroAdaConfig(k=1, target_modules=["query"], modules_to_save=["classifier"]))
    assert isinstance(model.base_model.model.classifier, ModulesToSaveWrapper)
    assert {n for n in _trainable(model) if "neuroada" not in n} == {
        "classifier.modules_to_save.default.weight",
        "classifier.modules_to_save.default.bias",
    }


def test_trainable_tokens(llama, ids):
    token = int(ids[0, 0])
    config = NeuroAdaConfig(k=1, target_modules=["q_proj"], trainable_token_indices=[token])
    model = get_peft_model(llama, config)
    assert any("trainable_tokens_delta" in name for name in _trainable(model))
    expected = logits(model, ids)
    delta = next(p for n, p in model.named_parameters() if "trainable_tokens_delta" in n)
    delta.data.add_(1.0)
    assert not torch.equal(logits(model, ids)[0], expected[0])


# ------------------------------------------------------------------ refused, and the model as before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("selection", ["magnitude", "random"])
def test_weight_that_is_not_finite(llama, selection, value):
    broken = "model.layers.1.mlp.down_proj"
    llama.get_submodule(broken).weight.data[3, 5] = value
    with Untouched(llama), pytest.raises(ValueError) as error:
        get_peft_model(llama, NeuroAdaConfig(selection=selection))
    for word in (broken, "NaN or infinity", "exclude_modules"):
        assert word in str(error.value)
    get_peft_model(llama, NeuroAdaConfig(selection=selection, exclude_modules=[broken]))  # the remedy works


def _scores(model):
    return {name: module.weight.detach().clone() for name, module in model.named_modules() if name.endswith("_proj")}


def test_gradient_selection_without_scores(llama):
    with Untouched(llama), pytest.raises(ValueError, match=r"selection='gradient' needs scores(.|\n)*with_scores"):
        get_peft_model(llama, NeuroAdaConfig(selection="gradient"))


UP = "model.layers.0.mlp.up_proj"
SCORES = {
    "lacking": (lambda scores: scores.pop(UP), f"'{UP}'; add them, or leave it out"),
    "another shape": (
        lambda scores: scores.update({UP: scores[UP].t().contiguous()}),
        rf"{UP}'\] has shape \(32, 272\)",
    ),
    "not finite": (lambda scores: scores[UP].fill_(torch.nan), f"scores of module '{UP}'"),
}


@pytest.mark.parametrize(("spoil", "message"), SCORES.values(), ids=SCORES)
def test_scores_that_do_not_fit(llama, spoil, message):
    scores = _scores(llama)
    spoil(scores)
    with Untouched(llama), pytest.raises(ValueError, match=message):
        get_peft_model(llama, NeuroAdaConfig(selection="gradient").with_scores(scores))


def test_second_adapter_refused_leaves_the_first(llama, ids):
    model = fill(get_peft_model(llama, NeuroAdaConfig(target_modules=["q_proj"]))).eval()
    expected = logits(model, ids)
    with Untouched(model), pytest.raises(TypeError, match="Embedding"):
        model.add_adapter("second", NeuroAdaConfig(target_modules=["q_proj", "embed_tokens"]))
    assert set(model.peft_config) == {"default"}
    assert torch.equal(logits(model, ids), expected)
    model.add_adapter("second", NeuroAdaConfig(target_modules=["q_proj"]))  # the name is free


def test_refused_first_adapter_can_be_repeated_without_a_warning(llama, recwarn):
    for _ in range(2):
        with pytest.raises(TypeError):
            get_peft_model(llama, NeuroAdaConfig(target_modules=["embed_tokens"]))
    get_peft_model(llama, NeuroAdaConfig())
    assert not [str(w.message) for w in recwarn if "second time" in str(w.message) or "multiple" in str(w.message)]


# ------------------------------------------------------------------ names of adapters

ROUTES = {
    "get_peft_model": lambda model, name: get_peft_model(model, NeuroAdaConfig(), adapter_name=name),
    "injected": lambda model, name: inject_adapter_in_model(NeuroAdaConfig(), model, adapter_name=name),
    "transformers": lambda model, name: model.add_adapter(NeuroAdaConfig(), adapter_name=name),
    "of text": lambda model, name: get_peft_model(model, MoReSConfig(rank=1, token_positions="f1"), adapter_name=name),
}


@pytest.mark.parametrize("name", ["a.b", "keys", "training"])
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_names_that_torch_has_no_place_for_are_refused(llama, route, name):
    with Untouched(llama), pytest.raises(ValueError, match=rf"adapter_name='{name}' must be"):
        route(llama, name)


@pytest.mark.parametrize("name", ["a.b", "keys"])
def test_such_names_are_refused_beside_an_adapter(llama, tmp_path, name):
    model = get_peft_model(llama, NeuroAdaConfig())
    model.save_pretrained(tmp_path)
    for add in (
        lambda: model.add_adapter(name, NeuroAdaConfig()),
        lambda: model.load_adapter(tmp_path, name),
        lambda: model.add_weighted_adapter(["default"], [1.0], name),
    ):
        with Untouched(model), pytest.raises(ValueError, match=rf"adapter_name='{name}' must be"):
            add()
        assert set(model.peft_config) == {"default"}
