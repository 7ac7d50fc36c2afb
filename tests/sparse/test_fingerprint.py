"""The fingerprint of the base weight: what it accepts and what it refuses."""

import pytest
import torch

from peft_ext.sparse.fingerprint import FINGERPRINT_LENGTH, check_fingerprint, unknown_fingerprint
from peft_ext.sparse.support import Support

from ._asserts import positions
from ._inputs import SHAPES, make_inputs, random_support


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


FORMS = {shape: make_inputs(SHAPES[shape]).support for shape in ("k1", "k2", "ragged")}
ALL_FORMS = pytest.mark.parametrize("support", FORMS.values(), ids=FORMS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ALL_FORMS
def test_the_same_weight_is_recognised(support, dtype):
    weight = torch.randn(support.rows, support.fan_in).to(dtype)
    fingerprint = support.fingerprint(weight)
    assert fingerprint.shape == (FINGERPRINT_LENGTH,) and fingerprint.dtype == torch.int64
    assert support.mismatch(fingerprint, weight) is None
    assert support.mismatch(fingerprint, weight.t().contiguous().t()) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ALL_FORMS
def test_any_one_changed_entry_is_detected(support, dtype):
    """Down to the last bit, at each entry of the support."""
    weight = torch.randn(support.rows, support.fan_in).to(dtype)
    fingerprint = support.fingerprint(weight)
    for row, column in positions(support):
        for change in ("next", "sign", "zero", "double"):
            other = weight.clone()
            if change == "next":
                other[row, column] = torch.nextafter(weight[row, column], torch.tensor(torch.inf, dtype=dtype))
            else:
                other[row, column] *= {"sign": -1, "zero": 0, "double": 2}[change]
            assert support.mismatch(fingerprint, other) is not None, change


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ALL_FORMS
def test_any_two_swapped_entries_are_detected(support, dtype):
    weight = torch.randn(support.rows, support.fan_in).to(dtype)
    fingerprint = support.fingerprint(weight)
    values = support.gather(weight).reshape(-1)
    for first in range(len(values)):
        for second in range(first):
            swapped = values.clone()
            swapped[[first, second]] = values[[second, first]]
            other = weight.clone()
            support.scatter_(other, swapped.view(support.indices.shape))
            assert support.mismatch(fingerprint, other) is not None


@ALL_FORMS
def test_the_rest_of_the_weight_does_not_matter(support):
    """A weight is told by its entries at the support: cheap, and what the adapter was made for."""
    weight = torch.randn(support.rows, support.fan_in)
    other = torch.randn(support.rows, support.fan_in)
    support.scatter_(other, support.gather(weight))
    assert support.mismatch(support.fingerprint(weight), other) is None


def _chosen(selection, rows, fan_in, k, seed):
    weight = torch.randn(rows, fan_in, generator=torch.Generator().manual_seed(seed)) * 0.02
    by_size = weight.abs().argsort(1, descending=selection == "magnitude")
    if selection == "random":
        by_size = torch.rand(rows, fan_in, generator=torch.Generator().manual_seed(seed + 1)).argsort(1)
    return Support(by_size[:, :k].sort(1).values.to(torch.int32), fan_in), weight


SIZES = [(16, 32, 1), (64, 128, 4), (256, 512, 20)]
CASTS = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float32, torch.float64),
]


@pytest.mark.parametrize("levels", [None, 1, 2, 15])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("selection", ["magnitude", "random", "smallest"])
def test_a_cast_of_the_same_weight_is_accepted_and_another_weight_refused(selection, size, levels):
    """Also of few distinct values, as a weight has that was quantised once: equal values have equal rounding errors.
    The other is of the same distribution, as a base of another training seed would be."""
    for seed in range(10):
        support, weight = _chosen(selection, *size, seed)
        _, other = _chosen(selection, *size, seed + 100)
        if levels is not None:
            weight = (weight * 50).clamp(-1, 1).mul(levels).round().clamp(min=1) / 30
        for stored, loaded in [*CASTS, (torch.float32, torch.float32)]:
            fingerprint = support.fingerprint(weight.to(stored))
            assert support.mismatch(fingerprint, weight.to(stored).to(loaded)) is None, (seed, stored, loaded)
            assert support.mismatch(fingerprint, other.to(loaded)) is not None, (seed, stored, loaded)


def test_another_shape_is_refused():
    support, weight = _chosen("magnitude", 16, 32, 2, 0)
    fingerprint = support.fingerprint(weight)
    wider = Support(support.indices, 40)
    assert "16x32" in wider.mismatch(fingerprint, torch.cat([weight, weight[:, :8]], 1))
    fewer = Support(support.indices[:8], 32)
    assert "16x32" in fewer.mismatch(fingerprint, weight[:8])


def test_small_errors_of_a_quantised_base_are_accepted_and_other_weights_are_not():
    support, weight = _chosen("magnitude", 256, 512, 4, 0)
    fingerprint = support.fingerprint(weight)
    noisy = weight * (1 + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    assert support.mismatch(fingerprint, noisy) is not None
    assert support.mismatch(fingerprint, noisy, quantised=True) is None
    assert support.mismatch(fingerprint, _chosen("magnitude", 256, 512, 4, 2)[1], quantised=True) is not None


def test_a_fingerprint_of_zeros_matches_anything():
    """It is what an adapter made on the meta device carries."""
    support, weight = _chosen("magnitude", 16, 32, 2, 0)
    assert support.mismatch(torch.zeros(FINGERPRINT_LENGTH, dtype=torch.int64), weight) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ALL_FORMS
def test_every_fingerprint_is_plausible(support, dtype):
    shape = support.rows, support.fan_in
    check_fingerprint(support.fingerprint(torch.randn(shape).to(dtype)), *shape)
    check_fingerprint(unknown_fingerprint(*shape), *shape)


@pytest.mark.parametrize(
    ("place", "number", "message"),
    [
        (0, 15, "15x32"),
        (1, 33, "16x33"),
        (2, 99, "99"),
        (2, 0, "has 0 for"),
        (4, 0x7FF0 << 48, "not finite"),
        (5, 0x7FF8 << 48, "not finite"),
    ],
)
def test_an_implausible_fingerprint_is_refused(place, number, message):
    support, weight = _chosen("magnitude", 16, 32, 2, 0)
    fingerprint = support.fingerprint(weight)
    fingerprint[place] = number
    with pytest.raises(ValueError, match=message):
        check_fingerprint(fingerprint, 16, 32)


def test_a_fingerprint_of_another_type_is_refused():
    support, weight = _chosen("magnitude", 16, 32, 2, 0)
    with pytest.raises(ValueError, match="int32"):
        check_fingerprint(support.fingerprint(weight).to(torch.int32), 16, 32)


def test_sums_that_are_not_finite_match_no_cast():
    support, weight = _chosen("magnitude", 16, 32, 2, 0)
    fingerprint = support.fingerprint(weight)
    fingerprint[4] = 0x7FF8 << 48  # NaN
    assert support.mismatch(fingerprint, weight.bfloat16()) is not None


def test_the_fingerprint_of_an_empty_support_matches_by_shape():
    support = random_support(4, 6, (0, 0, 0, 0), torch.Generator())
    fingerprint = support.fingerprint(torch.randn(4, 6))
    assert support.mismatch(fingerprint, torch.randn(4, 6)) is None
    assert Support(support.indices, 7, support.offsets).mismatch(fingerprint, torch.randn(4, 7)) is not None
