"""Merging writes W + S, unmerging restores every bit: any dtype, any number of rounds, any order."""

import copy
import itertools
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrizations

from peft_ext import NeuroAdaConfig
from peft_ext.sparse.delta import SparseDelta

from ._asserts import assert_same_bits, bits, dense_update
from ._inputs import adapt, random_linear, random_support


FAN_IN, ROWS = 12, 8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
KINDS = pytest.mark.parametrize("kind", ["linear", "conv1d"])
NAMES = ("a", "b", "c")


def _layer(kind="linear", dtype=torch.float32, adapters=NAMES, k=5, scale=100.0, **options):
    """Values that dwarf the weights, so that W + v − v would lose bits, and entries that overlap (5 of 12)."""
    return adapt(random_linear(FAN_IN, ROWS, kind, dtype), k, adapters=adapters, values_scale=scale, **options)


def _update(layer, name):
    delta = layer.deltas[name]
    return dense_update(delta.weight.detach().double(), delta.support)


def test_the_adapters_of_these_tests_overlap():
    layer = _layer()
    entries = [_update(layer, name) != 0 for name in NAMES]
    assert bool((entries[0] & entries[1] & ~entries[2]).any()) and bool((entries[0] & entries[1] & entries[2]).any())


@KINDS
@EVERY_DTYPE
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_adds_the_update_and_the_output_stays(kind, dtype, safe_merge):
    layer = _layer(kind, dtype, adapters=("a",), scale=1.0, backend="bypass", values_dtype="float32")
    x = torch.randn(5, FAN_IN).to(dtype)
    before, weight = layer(x), layer.base_matrix().float()
    expected = (weight + _update(layer, "a").float()).to(dtype)  # rounded once
    layer.merge(safe_merge=safe_merge)
    assert layer.merged and layer.merged_adapters == ["a"]
    assert torch.equal(layer.base_matrix(), expected)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(layer(x), before, rtol=tolerance, atol=tolerance)


@KINDS
@EVERY_DTYPE
def test_get_delta_weight_is_what_merge_adds(kind, dtype):
    layer = _layer(kind, dtype, adapters=("a",))
    delta = layer.get_delta_weight("a")
    assert delta.shape == layer.base_layer.weight.shape
    expected = _update(layer, "a")
    assert torch.equal(delta.double(), expected.t() if kind == "conv1d" else expected)


@KINDS
@EVERY_DTYPE
def test_unmerge_restores_every_bit_after_any_number_of_rounds(kind, dtype):
    layer = _layer(kind, dtype)
    original = bits(layer.base_layer.weight)
    for round_ in range(5):
        layer.merge(safe_merge=round_ % 2 == 1)
        assert not torch.equal(bits(layer.base_layer.weight), original)
        layer.unmerge()
        assert_same_bits(layer.base_layer.weight, original)
        assert not layer.merged
        layer.deltas["a"].weight.data.mul_(-1.7)


@EVERY_DTYPE
def test_any_weights_come_back(dtype):
    """Also those that no arithmetic brings back: signed zeros, the smallest and the largest numbers."""
    layer = _layer(dtype=dtype)
    extremes = torch.tensor([0.0, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal / 2], dtype=dtype)
    layer.base_layer.weight.data.copy_(extremes.repeat(ROWS, FAN_IN // 4))
    original = bits(layer.base_layer.weight)
    layer.merge()
    layer.unmerge()
    assert_same_bits(layer.base_layer.weight, original)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@EVERY_DTYPE
@pytest.mark.parametrize("unmerged", list(itertools.permutations(NAMES)), ids="".join)
@pytest.mark.parametrize("merged", [("a", "b", "c"), ("c", "a", "b")], ids="".join)
def test_adapters_unmerge_in_any_order(dtype, merged, unmerged):
    layer = _layer(dtype=dtype)
    original = bits(layer.base_layer.weight)
    for name in merged:
        layer.merge(adapter_names=[name])
    assert layer.merged_adapters == list(merged)
    for place, name in enumerate(unmerged):
        layer.unmerge(adapter_names=[name])
        left = [other for other in merged if other not in unmerged[: place + 1]]
        assert layer.merged_adapters == left
        fresh = _layer(dtype=dtype)
        if left:
            fresh.merge(adapter_names=left)
        assert_same_bits(layer.base_layer.weight, bits(fresh.base_layer.weight))
    assert_same_bits(layer.base_layer.weight, original)


def test_merging_twice_merges_once():
    layer = _layer()
    layer.merge(adapter_names=["a"])
    merged = bits(layer.base_layer.weight)
    with pytest.warns(UserWarning, match="already"):
        layer.merge(adapter_names=["a"])
    assert layer.merged_adapters == ["a"]
    assert_same_bits(layer.base_layer.weight, merged)


def test_unmerging_nothing_warns_and_changes_nothing():
    layer = _layer()
    original = bits(layer.base_layer.weight)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()
    assert_same_bits(layer.base_layer.weight, original)


@EVERY_DTYPE
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("broken", NAMES)
def test_safe_merge_of_a_broken_adapter_leaves_every_bit(dtype, value, broken):
    """Also when adapters before it in the same call were sound."""
    layer = _layer(dtype=dtype)
    layer.deltas[broken].weight.data[3, 1] = value
    original = bits(layer.base_layer.weight)
    with pytest.raises(ValueError, match=broken):
        layer.merge(safe_merge=True)
    assert_same_bits(layer.base_layer.weight, original)
    assert not layer.merged


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_safe_merge_of_a_broken_adapter_keeps_what_was_merged_before():
    layer = _layer()
    original = bits(layer.base_layer.weight)
    layer.merge(adapter_names=["a"])
    merged = bits(layer.base_layer.weight)
    layer.deltas["c"].weight.data[3, 1] = torch.nan
    with pytest.raises(ValueError, match="adapter c"):
        layer.merge(safe_merge=True, adapter_names=["b", "c"])
    assert layer.merged_adapters == ["a"]
    assert_same_bits(layer.base_layer.weight, merged)
    layer.unmerge()
    assert_same_bits(layer.base_layer.weight, original)


def test_safe_merge_notices_an_overflow_of_the_base_dtype():
    layer = _layer(dtype=torch.float16, adapters=("a",), values_dtype="float32")
    layer.deltas["a"].weight.data[0, 0] = 1e6
    original = bits(layer.base_layer.weight)
    with pytest.raises(ValueError, match="adapter a"):
        layer.merge(safe_merge=True)
    assert_same_bits(layer.base_layer.weight, original)


def test_an_unsafe_merge_of_a_broken_adapter_can_be_taken_back():
    layer = _layer()
    original = bits(layer.base_layer.weight)
    layer.deltas["b"].weight.data.fill_(torch.nan)
    layer.merge()
    assert layer.base_layer.weight.isnan().any()
    layer.unmerge()
    assert_same_bits(layer.base_layer.weight, original)


@pytest.mark.parametrize("merged", [(), ("a",), NAMES], ids="".join)
def test_disabling_unmerges_and_gives_the_base_output(merged):
    layer = _layer(backend="bypass")
    original = bits(layer.base_layer.weight)
    x = torch.randn(5, FAN_IN)
    expected = layer.base_layer(x)
    if merged:
        layer.merge(adapter_names=list(merged))
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected)
    assert_same_bits(layer.base_layer.weight, original)


@pytest.mark.parametrize("deleted", NAMES)
def test_a_merged_adapter_that_is_deleted_leaves_no_trace(deleted):
    layer = _layer()
    original = bits(layer.base_layer.weight)
    layer.merge()
    layer.delete_adapter(deleted)
    layer.unmerge()
    assert_same_bits(layer.base_layer.weight, original)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
@EVERY_DTYPE
def test_a_copy_of_a_merged_layer_unmerges_by_itself(dtype, copied):
    layer = _layer(dtype=dtype)
    original = bits(layer.base_layer.weight)
    layer.merge()
    merged = bits(layer.base_layer.weight)
    other = copied(layer)
    other.unmerge()
    assert_same_bits(other.base_layer.weight, original)
    assert_same_bits(layer.base_layer.weight, merged)
    layer.unmerge()
    assert_same_bits(layer.base_layer.weight, original)


def test_a_model_merges_and_unmerges_all_its_layers():
    base = nn.Sequential(random_linear(10, 10), nn.Tanh(), random_linear(10, 10, "conv1d", seed=1))
    model = get_peft_model(base, NeuroAdaConfig(k=6, target_modules=["0", "2"], init_weights=False))
    weights = [base[number].base_layer.weight for number in (0, 2)]
    original = [bits(weight) for weight in weights]
    model.merge_adapter()
    assert not any(torch.equal(bits(weight), before) for weight, before in zip(weights, original, strict=True))
    model.unmerge_adapter()
    for weight, before in zip(weights, original, strict=True):
        assert_same_bits(weight, before)


def test_a_weight_that_is_computed_is_not_merged_into_silently():
    """Under a parametrization `weight` is a new tensor each time: what is written into it is lost."""
    layer = adapt(parametrizations.weight_norm(nn.Linear(FAN_IN, ROWS)).requires_grad_(False))
    x = torch.randn(5, FAN_IN)
    before = layer(x)
    try:
        layer.merge()
    except (ValueError, NotImplementedError) as error:
        assert "weight" in str(error)
    torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize("form", ["ragged", "empty"])
def test_ragged_supports_merge_and_unmerge(form):
    layer = _layer(adapters=("a",))
    counts = [0, 3, 1, 12, 0, 2, 0, 4] if form == "ragged" else [0] * 8
    delta = SparseDelta(random_support(ROWS, FAN_IN, counts, torch.Generator().manual_seed(0)), torch.float32)
    delta.weight.data.normal_(std=100.0)
    layer.deltas["a"] = delta
    original = layer.base_layer.weight.detach().clone()
    layer.merge(safe_merge=True)
    assert layer.merged_adapters == ["a"]
    assert torch.equal(layer.base_layer.weight, (original + _update(layer, "a")).float())
    layer.unmerge()
    assert_same_bits(layer.base_layer.weight, bits(original))
