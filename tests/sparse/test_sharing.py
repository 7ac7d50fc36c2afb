"""Modules that share one weight: one set of values, one merge, and a checkpoint that any of them can load."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_ext import NeuroAdaConfig
from tests._models.networks import small_llama

from ._asserts import assert_same_bits, assert_same_state, bits, state_bits


WIDTH = 8
TIES = {"one parameter": lambda parameter: parameter, "one storage": lambda parameter: nn.Parameter(parameter.data)}
EVERY_TIE = pytest.mark.parametrize("tie", TIES.values(), ids=TIES)


class Tied(nn.Module):
    """`one` and `two` share a weight; so do `head` and an embedding. Every copy has the same numbers. Modules with
    parameters of their own over one storage are made anew: a copy would lose it."""

    def __init__(self, tie=TIES["one parameter"]):
        torch.manual_seed(0)
        super().__init__()
        self.embed = nn.Embedding(12, WIDTH)
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 12, bias=False)
        self.two.weight, self.head.weight = tie(self.one.weight), tie(self.embed.weight)

    def forward(self, ids):
        return self.head(self.two(torch.tanh(self.one(self.embed(ids)))))


def _untied():
    base = Tied()
    base.two.weight = nn.Parameter(base.one.weight.detach().clone())
    return base


@pytest.fixture
def ids():
    return torch.randint(0, 12, (3, 5), generator=torch.Generator().manual_seed(1))


def _adapted(base, targets, **options):
    config = NeuroAdaConfig(k=2, target_modules=targets, **{"init_weights": False, "selection": "random", **options})
    return get_peft_model(base, config).eval()


@EVERY_TIE
def test_values_are_shared_and_counted_once(ids, tie):
    model = _adapted(Tied(tie), ["one", "two"])
    one, two = model.base_model.model.one, model.base_model.model.two
    assert one.deltas["default"] is two.deltas["default"]
    assert model.get_nb_trainable_parameters()[0] == 2 * WIDTH
    dense = Tied(tie)
    dense.one.weight = dense.two.weight = nn.Parameter(dense.one.weight + one.get_delta_weight("default"))
    model(ids).square().sum().backward()
    dense(ids).square().sum().backward()
    delta = one.deltas["default"]
    torch.testing.assert_close(delta.weight.grad, delta.support.gather(dense.one.weight.grad))


@EVERY_TIE
@pytest.mark.parametrize("targets", [["one", "two"], ["one"], ["two", "head"], ["one", "two", "head"]], ids=str)
def test_merging_changes_what_the_adapters_change_and_unmerging_restores_every_bit(ids, targets, tie):
    model = _adapted(Tied(tie), targets)
    inner, expected = model.base_model.model, model(ids).detach()
    original = state_bits(model)
    for _ in range(2):
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(model(ids), expected)
        assert_same_bits(inner.embed.weight, bits(Tied().embed.weight))
        model.unmerge_adapter()
        assert _tied(inner.one, inner.two) and _tied(inner.head, inner.embed)
        assert_same_state(model, original)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids), expected)
    assert _tied(merged.one, merged.two) == ({"one", "two"} <= set(targets))
    assert _tied(merged.head, merged.embed) == ("head" not in targets)


def _tied(one, two):
    return one.weight.data_ptr() == two.weight.data_ptr()


def test_one_layer_merged_by_itself_is_merged_for_both(ids):
    model = _adapted(Tied(), ["one", "two"])
    expected = model(ids).detach()
    one, two = model.base_model.model.one, model.base_model.model.two
    two.merge()
    assert one.merged_adapters == two.merged_adapters == ["default"]
    torch.testing.assert_close(model(ids), expected)
    one.unmerge()
    assert_same_bits(one.weight, bits(Tied().one.weight))


def test_adapters_on_different_parts_of_a_shared_weight_merge_into_copies(ids):
    model = _adapted(Tied(), ["one", "two"])
    config = NeuroAdaConfig(k=1, target_modules=["two"], selection="random", init_weights=False)
    model.add_adapter("other", config)
    for active in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(active)
        expected = model(ids).detach()
        model.merge_adapter()
        torch.testing.assert_close(model(ids), expected)
        model.unmerge_adapter()
        assert model.base_model.model.one.weight is model.base_model.model.two.weight
        assert_same_bits(model.base_model.model.one.weight, bits(Tied().one.weight))


@pytest.mark.parametrize("selection", ["random", "magnitude_layer", "magnitude_network"])
@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}], ids=str)
def test_a_checkpoint_restores_the_shared_values(ids, selection, options, tmp_path):
    model = _adapted(Tied(), ["one", "two"], selection=selection)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Tied(), tmp_path, **options).eval()
    inner = loaded.base_model.model
    assert inner.one.deltas["default"] is inner.two.deltas["default"]
    assert torch.equal(loaded(ids), model(ids))


def test_a_checkpoint_of_untied_weights_is_not_loaded_onto_tied_ones(tmp_path):
    _adapted(_untied(), ["one", "two"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="share one weight"):
        PeftModel.from_pretrained(Tied(), tmp_path)


def test_a_tied_checkpoint_loads_onto_untied_weights(ids, tmp_path):
    model = _adapted(Tied(), ["one", "two"])
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(_untied(), tmp_path).eval()(ids), model(ids))


def test_a_merged_output_layer_leaves_the_embedding_alone(tmp_path):
    """The saved model is untied then, and says so."""
    base = small_llama(tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    embedding = bits(base.lm_head.weight)
    ids = torch.randint(0, 16, (2, 4))
    with pytest.warns(UserWarning, match="tied"):
        model = get_peft_model(base, NeuroAdaConfig(k=2, target_modules=["lm_head"], init_weights=False)).eval()
    with torch.no_grad():
        expected = model(ids).logits
        with pytest.warns(UserWarning, match="no longer tied"):
            merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected)
        assert_same_bits(merged.model.embed_tokens.weight, embedding)
        merged.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(again(ids).logits, merged(ids).logits)


def test_transformers_saves_and_loads_shared_values(tmp_path):
    def tied():
        model = small_llama()
        attention = model.model.layers[0].self_attn
        attention.k_proj.weight = attention.q_proj.weight
        return model

    model, ids = tied(), torch.randint(0, 16, (2, 4))
    model.add_adapter(NeuroAdaConfig(k=2, target_modules=["q_proj", "k_proj"], init_weights=False))
    model.eval().save_pretrained(tmp_path)
    other = tied()
    other.load_adapter(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(other.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("first", "second"), [(slice(0, 6), slice(2, 8)), (slice(0, 4), slice(0, 8))], ids=str)
def test_layers_that_overlap_in_memory_merge_into_copies(first, second):
    """Each sees its own update only, whichever of them was merged first."""
    torch.manual_seed(0)
    whole = torch.randn(8, WIDTH)
    before = bits(whole)
    base = nn.ModuleDict({"one": nn.Linear(WIDTH, 1), "two": nn.Linear(WIDTH, 1)})
    base["one"].weight, base["two"].weight = nn.Parameter(whole[first]), nn.Parameter(whole[second])
    for layer in base.values():
        layer.bias = None
    config = NeuroAdaConfig(k=WIDTH, target_modules=["one", "two"], init_weights=False)
    model = get_peft_model(base, config)
    x = torch.randn(5, WIDTH)
    expected = {name: layer(x).detach() for name, layer in base.items()}
    model.merge_adapter()
    for name, layer in base.items():
        torch.testing.assert_close(layer(x), expected[name])
    assert_same_bits(whole, before)
    model.unmerge_adapter()
    for name, layer in base.items():
        assert torch.equal(layer(x), expected[name]) and layer.weight.data_ptr() in (
            whole[first].data_ptr(),
            whole[second].data_ptr(),
        )


def test_neighbours_in_one_storage_merge_in_place():
    """As the weights of a fused projection are: no copy is made where nothing overlaps."""
    whole = torch.randn(8, WIDTH)
    base = nn.ModuleDict({"one": nn.Linear(WIDTH, 4, bias=False), "two": nn.Linear(WIDTH, 4, bias=False)})
    base["one"].weight, base["two"].weight = nn.Parameter(whole[:4]), nn.Parameter(whole[4:])
    model = get_peft_model(base, NeuroAdaConfig(k=1, target_modules=["one", "two"], init_weights=False))
    assert base["one"].deltas["default"] is not base["two"].deltas["default"]
    before = whole.clone()
    model.merge_adapter()
    assert int((whole != before).sum()) == 8  # one entry per neuron
    model.unmerge_adapter()
    assert torch.equal(whole, before)


@EVERY_TIE
def test_merging_into_a_bias_that_another_layer_uses_leaves_that_layer_alone(tie):
    torch.manual_seed(0)
    base = nn.ModuleDict({"one": nn.Linear(WIDTH, 4), "two": nn.Linear(WIDTH, 4)})
    base["two"].bias = tie(base["one"].bias)
    bias, shared = bits(base["one"].bias), base["one"].bias
    options = {"target_modules": ["one"], "train_bias": True, "init_weights": False}
    model = get_peft_model(base, NeuroAdaConfig(k=1, **options))
    x = torch.randn(5, WIDTH)
    expected = {name: layer(x).detach() for name, layer in base.items()}
    model.merge_adapter()
    for name, layer in base.items():
        torch.testing.assert_close(layer(x), expected[name])
    model.unmerge_adapter()
    assert base["one"].bias is shared
    assert_same_bits(shared, bias)
    model.merge_and_unload()
    torch.testing.assert_close(base["one"](x), expected["one"])
    assert torch.equal(base["two"](x), expected["two"])
