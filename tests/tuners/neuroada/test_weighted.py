"""Combining adapters: compared with the same combination of their dense updates."""

import pytest
import torch
from peft import PeftModel
from peft.utils.merge_utils import prune, task_arithmetic, ties
from transformers import AutoModelForCausalLM

from peft_ext import NeuroAdaConfig
from tests.contract._common import layers_of
from tests.contract._untouched import Untouched
from tests.tuners.neuroada._common import adapted, add, logits


# Options of two adapters: supports that are equal, overlap, are disjoint in modules, or ragged.
PAIRS = {
    "same": ({"k": 3}, {"k": 3}),
    "nested": ({"k": 2}, {"k": 4}),
    "apart": ({"k": 2}, {"k": 2, "selection": "reverse"}),
    "random": ({"k": 2, "selection": "random"}, {"k": 3, "selection": "random", "seed": 4}),
    "ratio": ({"k": 3, "neuron_ratio": 0.5}, {"k": 2, "neuron_ratio": 0.7, "seed": 3}),
    "network": ({"selection": "magnitude_network"}, {"selection": "random_network", "k": 2}),
    "table and ragged": ({"k": 2}, {"selection": "magnitude_layer"}),
    "modules": ({"k": 2, "target_modules": ["q_proj", "up_proj"]}, {"k": 2, "target_modules": ["up_proj", "v_proj"]}),
    "regex": ({"k": 2, "target_modules": r".*\.(q|up)_proj"}, {"k": 1, "target_modules": r".*\.0\..*v_proj"}),
    "capped": ({"k": 40}, {"k": 300}),
}


def two(base, pair="random"):
    first, second = PAIRS[pair]
    return add(adapted(base, **first), "b", **second)


def dense(layer, adapter_name):
    if adapter_name in layer.deltas:
        return layer.get_delta_weight(adapter_name)
    return torch.zeros_like(layer.base_layer.weight)


OF_LLAMA = ("modules", "regex")  # name modules of it


@pytest.mark.parametrize(
    ("name", "pair"),
    [*(("llama", pair) for pair in PAIRS), *(("gpt2", pair) for pair in PAIRS if pair not in OF_LLAMA)],
)
def test_linear_is_the_weighted_sum(tiny, name, pair):
    model = two(tiny(name), pair)
    model.add_weighted_adapter(["default", "b"], [0.3, -1.5], "c")
    assert all("c" in layer.deltas for layer in layers_of(model).values())
    for path, layer in layers_of(model).items():
        # the same two products and one sum in fp32 for each entry: equal in every bit
        expected = task_arithmetic([dense(layer, "default"), dense(layer, "b")], torch.tensor([0.3, -1.5]))
        assert torch.equal(dense(layer, "c"), expected), path


@pytest.mark.parametrize("pair", PAIRS)
def test_support_is_the_union(llama, pair):
    model = two(llama, pair)
    for layer in layers_of(model).values():
        for delta in layer.deltas.values():
            delta.weight.data.fill_(1.0)
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "c")
    for layer in layers_of(model).values():
        union = (dense(layer, "default") != 0) | (dense(layer, "b") != 0)
        assert layer.deltas["c"].support.entries == int(union.sum())
        assert torch.equal(dense(layer, "c") != 0, union)


def test_three_adapters(llama):
    model = add(two(llama), "d", k=1, selection="reverse", seed=5)
    model.add_weighted_adapter(["default", "b", "d"], [0.5, 0.25, 2.0], "c")
    for layer in layers_of(model).values():
        expected = 0.5 * dense(layer, "default") + 0.25 * dense(layer, "b") + 2.0 * dense(layer, "d")
        torch.testing.assert_close(dense(layer, "c"), expected)


# ------------------------------------------------------------------ TIES and DARE


def _pruned(layer, adapter_name, density):
    """An adapter's update, pruned among its own entries as TIES would, and made dense."""
    delta = layer.deltas[adapter_name]
    values = prune(delta.weight.detach().reshape(-1), density, "magnitude")
    result = torch.zeros(layer.out_features, layer.in_features)
    result[delta.support.row_of_entry(), delta.indices.reshape(-1).long()] = values
    return result


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("pair", ["same", "random", "ratio", "network"])
@pytest.mark.parametrize("density", [0.5, 0.9])
def test_ties_is_that_of_the_dense_updates(llama, pair, density, sign):
    model = two(llama, pair)
    weights = [0.7, 0.4]
    model.add_weighted_adapter(["default", "b"], weights, "c", "ties", density=density, majority_sign_method=sign)
    for path, layer in layers_of(model).items():
        updates = [_pruned(layer, name, density) for name in ("default", "b")]
        expected = ties(updates, torch.tensor(weights), 1.0, sign)
        torch.testing.assert_close(dense(layer, "c"), expected, msg=path)


@pytest.mark.parametrize("pair", ["same", "random", "ratio"])
def test_magnitude_prune_is_that_of_the_dense_updates(llama, pair):
    model = two(llama, pair)
    model.add_weighted_adapter(["default", "b"], [0.7, 0.4], "c", "magnitude_prune", density=0.5)
    for layer in layers_of(model).values():
        updates = [_pruned(layer, name, 0.5) for name in ("default", "b")]
        torch.testing.assert_close(dense(layer, "c"), task_arithmetic(updates, torch.tensor([0.7, 0.4])))


def test_dare_linear_keeps_a_rescaled_share(llama):
    """One adapter: each of its entries is dropped, or kept and divided by the density."""
    model = adapted(llama, k=8)
    torch.manual_seed(0)
    model.add_weighted_adapter(["default"], [1.0], "c", "dare_linear", density=0.25)
    kept = total = 0
    for layer in layers_of(model).values():
        before, after = dense(layer, "default"), dense(layer, "c")
        assert torch.all((after == 0) | torch.isclose(after, before / 0.25))
        kept, total = kept + int((after != 0).sum()), total + int((before != 0).sum())
    assert 0.2 < kept / total < 0.3


def test_dare_is_repeatable_with_a_seed(tiny):
    results = []
    for seed in (0, 0, 1):
        model = two(tiny("llama"))
        torch.manual_seed(seed)
        model.add_weighted_adapter(["default", "b"], [1.0, 0.5], "c", "dare_ties", density=0.5)
        results.append(
            torch.cat([layer.deltas["c"].weight.detach().reshape(-1) for layer in layers_of(model).values()])
        )
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("combination", ["dare_linear", "dare_ties"])
def test_dare_of_everything_is_the_combination_without_dropping(llama, combination):
    model = two(llama)
    model.add_weighted_adapter(["default", "b"], [0.7, 0.4], "c", combination, density=1.0)
    for layer in layers_of(model).values():
        updates = [dense(layer, "default"), dense(layer, "b")]
        weights = torch.tensor([0.7, 0.4])
        expected = ties(updates, weights, 1.0) if combination == "dare_ties" else task_arithmetic(updates, weights)
        torch.testing.assert_close(dense(layer, "c"), expected)


@pytest.mark.parametrize(
    ("combination", "density"),
    [
        ("linear", None),
        ("ties", 0.5),
        ("dare_ties", 0.5),
        ("magnitude_prune", 0.5),
        ("ties", 1.0),
        ("dare_linear", 1.0),
    ],
)
def test_what_is_asked_for_is_done_without_a_warning(llama, recwarn, combination, density):
    model = two(llama)
    recwarn.clear()
    model.add_weighted_adapter(["default", "b"], [0.7, 0.4], "c", combination, density=density)
    assert [str(warning.message) for warning in recwarn] == []


# ------------------------------------------------------------------ the new adapter is one like the others


@pytest.mark.parametrize("pair", ["random", "network", "modules"])
def test_saved_and_loaded_by_peft_and_by_transformers(tiny, ids, tmp_path, pair):
    model = two(tiny("llama"), pair)
    model.add_weighted_adapter(["default", "b"], [0.3, 0.7], "c")
    model.set_adapter("c")
    expected = logits(model, ids)
    model.save_pretrained(tmp_path, selected_adapters=["c"])
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            tiny("llama"), tmp_path / "c", low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
        ).eval()
        assert torch.equal(logits(loaded, ids), expected)
    base = tiny("llama")
    base.load_adapter(str(tmp_path / "c"))
    assert torch.equal(logits(base, ids), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "c"), ids), expected)


def test_it_can_be_trained_merged_combined_and_deleted(llama, ids):
    model = two(llama, "ratio")
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "c")
    model.set_adapter("c")
    model(ids, labels=ids).loss.backward()
    assert all(layer.deltas["c"].weight.grad.any() for layer in layers_of(model).values())
    expected = logits(model, ids)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    model.add_weighted_adapter(["c", "default"], [1.0, 0.0], "e")
    model.set_adapter("e")
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-5)
    model.delete_adapter("c")
    assert set(model.peft_config) == {"default", "b", "e"}


def test_adapters_selected_by_gradient_can_be_combined(llama, tiny, ids, tmp_path):
    scores = {name: torch.randn_like(m.weight) for name, m in llama.named_modules() if name.endswith("_proj")}
    from peft import get_peft_model

    config = NeuroAdaConfig(k=2, selection="gradient", neuron_ratio=0.5).with_scores(scores)
    model = add(get_peft_model(llama, config).eval(), "b", k=1)
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "c")
    model.set_adapter("c")
    expected = logits(model, ids)
    model.save_pretrained(tmp_path, selected_adapters=["c"])
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path / "c"), ids), expected)


# ------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["default", "x"], [1.0, 1.0], "c"), ["adapters=", "'x'", "choose from", "'b'"]),
        (([], [], "c"), ["adapters=[]", "choose from"]),
        ((["default", "b"], [1.0], "c"), ["weights=[1.0]", "one number for each of the 2"]),
        ((["default", "b"], [1.0, 1.0], "b"), ["adapter_name='b'", "exists already", "another name"]),
        ((["default", "b"], [1.0, 1.0], "c", "svd"), ["combination_type='svd'", "linear", "ties", "dare_linear"]),
        ((["default", "b"], [1.0, 1.0], "c", "ties"), ["density=None", "(0, 1]", "'ties'"]),
        ((["default", "b"], [1.0, 1.0], "c", "dare_ties", 0.0), ["density=0.0", "(0, 1]"]),
        ((["default", "b"], [1.0, 1.0], "c", "dare_linear", 1.5), ["density=1.5", "(0, 1]"]),
        ((["default", "b"], [1.0, 1.0], "c", "ties", 0.5, "median"), ["majority_sign_method='median'", "total"]),
    ],
)
def test_error_names_argument_value_and_remedy(llama, arguments, words):
    model = two(llama)
    with Untouched(model), pytest.raises(ValueError) as error:
        model.add_weighted_adapter(*arguments)
    assert not [word for word in words if word not in str(error.value)], str(error.value)


def test_regular_expression_and_list_can_not_be_combined(llama):
    model = add(adapted(llama, target_modules=["q_proj"]), "b", target_modules=r".*q_proj")
    with Untouched(model), pytest.raises(ValueError, match="target_modules.*regular expressions"):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "c")


def test_two_adapters_with_heads_can_not_be_combined(tiny):
    options = {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    model = add(adapted(tiny("bert"), **options), "b", **options)
    with Untouched(model), pytest.raises(ValueError, match="modules_to_save"):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "c")
    assert set(model.peft_config) == {"default", "b"}


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        ({"modules_to_save": ["classifier"]}, {}, "modules_to_save of \\['default'\\]"),
        ({}, {"modules_to_save": ["classifier"]}, "modules_to_save of \\['b'\\]"),
        ({"trainable_token_indices": {"word_embeddings": [5]}}, {}, "trainable_token_indices of \\['default'\\]"),
    ],
)
def test_what_has_no_weighted_sum_is_said_to_be_left_out(tiny, first, second, word):
    """The new adapter has the base model's head and tokens, as in PEFT, where no one would notice."""
    model = add(adapted(tiny("bert"), target_modules=["query"], **first), "b", target_modules=["query"], **second)
    with pytest.warns(UserWarning, match=word):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "c")


@pytest.mark.parametrize("values_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_keep_their_dtype(tiny, dtype, values_dtype):
    model = adapted(tiny("llama", dtype), values_dtype=values_dtype)
    add(model, "b", values_dtype=values_dtype)
    model.add_weighted_adapter(["default", "b"], [0.3, 0.3], "c")
    for layer in layers_of(model).values():
        delta = layer.neuroada_delta
        assert delta["c"].weight.dtype == delta["b"].weight.dtype == getattr(torch, values_dtype or "float32")
        expected = 0.3 * delta["default"].weight.float() + 0.3 * delta["b"].weight.float()
        torch.testing.assert_close(delta["c"].weight, expected.to(delta["c"].weight.dtype))
