"""The paths of convolutions agree with dense ones: output and each gradient."""

import copy
from dataclasses import replace

import pytest
import torch

from peft_ext.sparse.ops import ConvGeometry, bypass, conv, dense, folded
from peft_ext.sparse.ops.conv import entries_by_tap
from peft_ext.sparse.ops.geometry import pad
from peft_ext.sparse.ops.reference import sparse_product
from tests._models.layers import CONVS, with_weight

from .._asserts import TOLERANCES, assert_all_close, assert_same_bits, bits, dense_update
from .._inputs import DTYPES, random_support


# k of a table, or the number of entries of each row of a ragged support, capped at the fan-in.
SUPPORTS = {"k1": 1, "k3": 3, "ragged": (0, 2, 1, 0, 4, 1, 0, 3), "empty": (0,) * 8}
SOME = ("1d circular, grouped", "2d same, even kernel", "2d depthwise", "3d")

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def make_support(layer, form="k3"):
    rows, fan_in = layer.weight.shape[0], layer.weight[0].numel()
    entries = SUPPORTS[form]
    counts = min(entries, fan_in) if isinstance(entries, int) else [min(n, fan_in) for n in entries[:rows]]
    return random_support(rows, fan_in, counts, torch.Generator().manual_seed(2))


def make_values(support, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(support.indices.shape, generator=generator).to(dtype).requires_grad_()


def _tables(layer, support):
    geometry = ConvGeometry.of(layer)
    return support.indices, support.offsets, *entries_by_tap(support.indices, geometry.taps), geometry


def _bypass(layer, x, values, support):
    *tables, geometry = _tables(layer, support)
    return bypass(layer(x), pad(layer, x), values, *tables, geometry=geometry)


def _composed(path):
    return lambda layer, x, values, support: path(
        pad(layer, x), layer.weight, layer.bias, values, *_tables(layer, support)
    )


def _reference(layer, x, values, support):
    tables = (support.indices, support.offsets, ConvGeometry.of(layer))
    return sparse_product(pad(layer, x), layer.weight, layer.bias, values, *tables)


PATHS = {"bypass": _bypass, "folded": _composed(folded), "dense": _composed(dense), "reference": _reference}
EVERY_PATH = pytest.mark.parametrize("path", PATHS)


def _results(y, x, values, bias, grad):
    leaves = {"x": x, "values": values} | ({} if bias is None else {"bias": bias})
    gradients = torch.autograd.grad(y, list(leaves.values()), grad)
    return {"output": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def _assert_correct(path, layer, x, form="k3", values_dtype=torch.float64):
    """Output and gradients agree with torch's convolution of dense fp64 tensors, and the weight keeps every bit."""
    support = make_support(layer, form)
    values, original = make_values(support, values_dtype), bits(layer.weight)
    bias = None if layer.bias is None else layer.bias.requires_grad_(True)
    y = PATHS[path](layer, x, values, support)
    assert_same_bits(layer.weight, original)
    assert y.dtype == layer.weight.dtype
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype)
    wide = copy.deepcopy(layer).double()
    wide_x, wide_values = (tensor.detach().double().requires_grad_() for tensor in (x, values))
    weight = wide.weight + dense_update(wide_values, support).view(wide.weight.shape)
    expected = _results(with_weight(wide, wide_x, weight), wide_x, wide_values, wide.bias, grad.double())
    assert_all_close(_results(y, x, values, bias, grad), expected, TOLERANCES[layer.weight.dtype])
    assert_same_bits(layer.weight, original)


@pytest.mark.parametrize("form", SUPPORTS)
@pytest.mark.parametrize("case", CONVS)
@EVERY_PATH
def test_every_form_agrees_with_a_dense_convolution(path, case, form):
    _assert_correct(path, CONVS[case].build(), CONVS[case].draw(), form)


@pytest.mark.parametrize(("dtype", "values_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("case", SOME)
@EVERY_PATH
def test_every_dtype_agrees_with_a_dense_convolution(path, case, dtype, values_dtype):
    _assert_correct(path, CONVS[case].build(dtype), CONVS[case].draw(dtype), values_dtype=values_dtype)


@pytest.mark.parametrize("which", ["weight", "input", "both"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["2d", "2d grouped", "2d patches"])
@EVERY_PATH
def test_the_memory_format_does_not_matter(path, case, dtype, which):
    layer, x = CONVS[case].build(dtype), CONVS[case].draw(dtype)
    if which != "input":
        layer = layer.to(memory_format=torch.channels_last)
    if which != "weight":
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    _assert_correct(path, layer, x, values_dtype=dtype)


@pytest.mark.parametrize("case", SOME)
@EVERY_PATH
def test_a_sample_without_a_batch_and_a_batch_without_samples(path, case):
    whole = CONVS[case].draw(samples=1).detach()
    for x in (whole[0], whole[:0]):
        _assert_correct(path, CONVS[case].build(), x.clone().requires_grad_())


@pytest.mark.parametrize("case", SOME)
@EVERY_PATH
def test_small_pieces_change_nothing(path, case, monkeypatch):
    """A large input is worked on a few samples and entries at a time."""
    monkeypatch.setattr(conv, "CHUNK_ELEMENTS", 50)
    _assert_correct(path, CONVS[case].build(), CONVS[case].draw())


@pytest.mark.parametrize("form", SUPPORTS)
@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("path", ["bypass", "folded"])
def test_tap_by_tap_is_the_same(path, case, form, monkeypatch):
    """As where there are many entries per tap."""
    monkeypatch.setattr(conv, "ENTRIES_PER_TAP", 0)
    _assert_correct(path, CONVS[case].build(), CONVS[case].draw(), form)


@pytest.mark.parametrize("case", ["1d", "2d same, even kernel", "2d depthwise", "3d replicate, grouped"])
@EVERY_PATH
def test_second_derivatives_are_derivatives_of_the_first(path, case):
    kind = CONVS[case]
    small = replace(kind, size=(kind.size[0], *(4, 4, 3)[: len(kind.size) - 1]))
    layer = small.build()
    support = make_support(layer, "ragged")
    inputs = small.draw(samples=1), make_values(support)
    product = PATHS[path]
    assert torch.autograd.gradgradcheck(lambda x, values: product(layer, x, values, support), inputs, fast_mode=True)


@pytest.mark.parametrize("path", ["folded", "dense"])
def test_a_folded_weight_gets_its_bits_back_after_an_error(path):
    layer = CONVS["2d"].build()
    original = bits(layer.weight)
    support = make_support(layer)
    with pytest.raises(RuntimeError):
        PATHS[path](layer, torch.randn(1, 3, 5, 5, dtype=torch.float64), make_values(support), support)
    assert_same_bits(layer.weight, original)


@pytest.mark.parametrize("case", CONVS)
def test_a_geometry_survives_packing(case):
    geometry = ConvGeometry.of(CONVS[case].build())
    assert ConvGeometry.unpack(geometry.pack()) == geometry
