"""Which path a layer takes: what the user asks for where it can be done, else the bypass."""

import pytest
import torch

from peft_ext.sparse.ops import BACKENDS, choose_backend
from peft_ext.sparse.ops.dispatch import DENSE_ABOVE, DENSE_ABOVE_RAGGED


def _choose(requested="auto", dtype=torch.float32, x_dtype=None, entries=64, rows=64, fan_in=100, **options):
    x, weight = torch.zeros(3, fan_in, dtype=x_dtype or dtype), torch.zeros(rows, fan_in, dtype=dtype)
    return choose_backend(requested, x, weight, entries, rows, **options)


@pytest.mark.parametrize("requested", ["bypass", "folded", "dense", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_request_is_honoured(requested, dtype):
    assert _choose(requested, dtype) == requested


@pytest.mark.parametrize("requested", BACKENDS)
def test_without_a_weight_to_read_it_is_the_bypass(requested):
    assert choose_backend(requested, torch.zeros(3, 100), None, 64, 64) == "bypass"


@pytest.mark.parametrize("requested", BACKENDS)
def test_an_empty_support_takes_the_bypass(requested):
    assert _choose(requested, entries=0) == "bypass"


@pytest.mark.parametrize("requested", BACKENDS)
def test_other_dtypes_of_x_and_weight_take_the_bypass(requested):
    assert _choose(requested, torch.bfloat16, x_dtype=torch.float32) == "bypass"


@pytest.mark.parametrize("requested", BACKENDS)
def test_autocast_takes_the_bypass(requested):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _choose(requested) == "bypass"


@pytest.mark.parametrize(("requested", "expected"), [("folded", "bypass"), ("auto", "bypass"), ("dense", "dense")])
def test_a_ragged_support_is_not_folded(requested, expected):
    assert _choose(requested, is_table=False) == expected


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, "folded"), (torch.bfloat16, "bypass")], ids=str)
def test_auto_folds_only_where_the_values_are_not_rounded_to_16_bits(dtype, expected):
    assert _choose(dtype=dtype) == expected


def test_auto_leaves_the_weight_alone_without_gradients():
    with torch.no_grad():
        assert _choose() == "bypass"


@pytest.mark.parametrize(("is_table", "share"), [(True, DENSE_ABOVE), (False, DENSE_ABOVE_RAGGED)])
def test_auto_goes_dense_above_the_measured_share(is_table, share):
    at = int(share * 64 * 100)
    assert _choose(entries=at, is_table=is_table) != "dense"
    assert _choose(entries=at + 1, is_table=is_table) == "dense"
