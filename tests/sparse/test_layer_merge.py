"""Merging writes W + S, unmerging restores every bit: any kind, dtype, number of rounds, order."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from tests._models.layers import CHANNELS_LAST, KINDS, PADDED, as_weight

from ._asserts import assert_same_bits, bits, dense_update
from ._inputs import adapt


EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SOME_KINDS = pytest.mark.parametrize("kind", ["Linear", "Conv1D", "2d grouped", *CHANNELS_LAST, *PADDED])
NAMES = ("a", "b", "c")


def _layer(kind="Linear", dtype=torch.float32, adapters=NAMES, k=5, scale=100.0, **options):
    """Values that dwarf the weights, so that W + v − v would lose bits, and entries that overlap (5 of 9)."""
    return adapt(KINDS[kind].build(dtype), k, adapters=adapters, values_scale=scale, **options)


def _update(layer, name):
    delta = layer.deltas[name]
    return dense_update(delta.weight.detach().double(), delta.support)


def test_the_adapters_of_these_tests_overlap():
    layer = _layer()
    entries = [_update(layer, name) != 0 for name in NAMES]
    assert bool((entries[0] & entries[1] & ~entries[2]).any()) and bool((entries[0] & entries[1] & entries[2]).any())


@SOME_KINDS
@EVERY_DTYPE
@pytest.mark.parametrize("selection", ["random", "random_layer"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_adds_the_update_and_the_output_stays(kind, dtype, selection, safe_merge):
    options = {"backend": "bypass", "values_dtype": "float32", "selection": selection}
    layer = _layer(kind, dtype, adapters=("a",), scale=1.0, **options)
    base, x = layer.base_layer, KINDS[kind].draw(dtype)
    before, update = layer(x).detach(), layer.get_delta_weight("a")
    assert torch.equal(update.double(), as_weight(base, _update(layer, "a")))
    expected = (base.weight.float() + update).to(dtype)  # rounded once
    layer.merge(safe_merge=safe_merge)
    assert layer.merged and layer.merged_adapters == ["a"]
    assert torch.equal(base.weight, expected)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype] * float(before.abs().max())
    for merged in (layer, base):
        torch.testing.assert_close(merged(x), before, rtol=0, atol=tolerance)


@SOME_KINDS
@EVERY_DTYPE
@pytest.mark.parametrize("selection", ["random", "random_layer"])
def test_unmerge_restores_every_bit_after_any_number_of_rounds(kind, dtype, selection):
    layer = _layer(kind, dtype, selection=selection)
    weight = layer.base_layer.weight
    original, strides = bits(weight), weight.stride()
    for round_ in range(5):
        layer.merge(safe_merge=round_ % 2 == 1)
        assert not torch.equal(bits(weight), original)
        layer.unmerge()
        assert_same_bits(weight, original)
        assert not layer.merged and weight.stride() == strides
        layer.deltas["a"].weight.data.mul_(-1.7)


@EVERY_DTYPE
def test_any_weights_come_back(dtype):
    """Also those that no arithmetic brings back: signed zeros, the smallest and the largest numbers."""
    layer = _layer(dtype=dtype)
    extremes = torch.tensor([0.0, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal / 2], dtype=dtype)
    layer.base_layer.weight.data.view(-1).copy_(extremes.repeat(99)[: 6 * 9])
    original = bits(layer.base_layer.weight)
    layer.merge()
    layer.unmerge()
    assert_same_bits(layer.base_layer.weight, original)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("unmerged", list(itertools.permutations(NAMES)), ids="".join)
@pytest.mark.parametrize("merged", [("a", "b", "c"), ("c", "a", "b")], ids="".join)
@pytest.mark.parametrize("kind", ["Linear", "2d grouped, channels last"])
def test_adapters_unmerge_in_any_order(kind, merged, unmerged):
    layer = _layer(kind)
    original = bits(layer.base_layer.weight)
    for name in merged:
        layer.merge(adapter_names=[name])
    assert layer.merged_adapters == list(merged)
    for place, name in enumerate(unmerged):
        layer.unmerge(adapter_names=[name])
        left = [other for other in merged if other not in unmerged[: place + 1]]
        assert layer.merged_adapters == left
        fresh = _layer(kind)
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


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, torch.nan), (torch.bfloat16, -torch.inf), (torch.float16, 1e6)], ids=str
)
@pytest.mark.parametrize("kind", ["Linear", "2d, channels last"])
@pytest.mark.parametrize("broken", NAMES)
def test_safe_merge_of_a_broken_adapter_leaves_every_bit(dtype, value, kind, broken):
    """Also when adapters before it in the same call were sound; 1e6 overflows the base's dtype only."""
    layer = _layer(kind, dtype, values_dtype="float32")
    layer.deltas[broken].weight.data[3, 1] = value
    original = bits(layer.base_layer.weight)
    with pytest.raises(ValueError, match=f"adapter {broken}"):
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
@pytest.mark.parametrize("kind", ["Linear", "dynamic"])
def test_a_copy_of_a_merged_layer_unmerges_by_itself(kind, copied):
    layer = _layer(kind, torch.bfloat16)
    original = bits(layer.base_layer.weight)
    layer.merge()
    merged = bits(layer.base_layer.weight)
    other = copied(layer)
    other.unmerge()
    assert_same_bits(other.base_layer.weight, original)
    assert_same_bits(layer.base_layer.weight, merged)
    layer.unmerge()
    assert_same_bits(layer.base_layer.weight, original)


def test_a_weight_that_is_computed_is_not_merged_into_silently():
    """Under a parametrization `weight` is a new tensor each time: what is written into it is lost."""
    layer = adapt(parametrizations.weight_norm(nn.Linear(9, 6)).requires_grad_(False))
    with pytest.raises(ValueError, match="weight is computed by a parametrization"):
        layer.merge()
