"""The paths of convolutions agree with dense ones: output and each gradient."""

import copy

import pytest
import torch

from peft_ext.sparse.ops import ConvGeometry, bypass_conv, conv, folded_conv
from peft_ext.sparse.ops.conv import entries_by_tap
from peft_ext.sparse.ops.folded_conv import reference_conv
from peft_ext.sparse.ops.geometry import pad

from .._asserts import TOLERANCES, assert_all_close, assert_same_bits, bits, dense_update
from .._convs import CONVS, ConvCase, dense_conv
from .._inputs import random_support


DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]
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
    return bypass_conv(layer(x), pad(layer, x), values, *_tables(layer, support))


def _folded(layer, x, values, support):
    return folded_conv(pad(layer, x), layer.weight, layer.bias, values, *_tables(layer, support))


def _dense(layer, x, values, support):
    return folded_conv(pad(layer, x), layer.weight, layer.bias, values, *_tables(layer, support), dense_gradient=True)


def _reference(layer, x, values, support):
    arguments = (support.indices, support.offsets, ConvGeometry.of(layer))
    return reference_conv(pad(layer, x), layer.weight, layer.bias, values, *arguments)


PATHS = {"bypass": _bypass, "folded": _folded, "dense": _dense, "reference": _reference}
EVERY_PATH = pytest.mark.parametrize("path", PATHS)


def _results(y, x, values, grad):
    gradients = torch.autograd.grad(y, [x, values], grad)
    return {"output": y.detach(), "gradient of x": gradients[0], "gradient of values": gradients[1]}


def _assert_correct(path, layer, x, values, support):
    """Output and gradients agree with torch's convolution of dense fp64 tensors."""
    y = PATHS[path](layer, x, values, support)
    assert y.dtype == layer.weight.dtype
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype)
    wide = copy.deepcopy(layer).double()
    wide_x, wide_values = (tensor.detach().double().requires_grad_() for tensor in (x, values))
    weight = wide.weight + dense_update(wide_values, support).view(wide.weight.shape)
    expected = _results(dense_conv(wide, wide_x, weight), wide_x, wide_values, grad.double())
    assert_all_close(_results(y, x, values, grad), expected, TOLERANCES[layer.weight.dtype])


@pytest.mark.parametrize("form", SUPPORTS)
@pytest.mark.parametrize("case", CONVS)
@EVERY_PATH
def test_every_form_agrees_with_a_dense_convolution(path, case, form):
    layer = CONVS[case].build()
    support = make_support(layer, form)
    _assert_correct(path, layer, CONVS[case].draw_input(), make_values(support), support)


@pytest.mark.parametrize(("dtype", "values_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("case", SOME)
@EVERY_PATH
def test_every_dtype_agrees_with_a_dense_convolution(path, case, dtype, values_dtype):
    layer = CONVS[case].build(dtype)
    support = make_support(layer)
    _assert_correct(path, layer, CONVS[case].draw_input(dtype), make_values(support, values_dtype), support)


@pytest.mark.parametrize("which", ["weight", "input", "both"])
@pytest.mark.parametrize("case", ["2d", "2d grouped", "2d patches"])
@EVERY_PATH
def test_the_memory_format_does_not_matter(path, case, which):
    layer, x = CONVS[case].build(), CONVS[case].draw_input()
    support = make_support(layer)
    if which != "input":
        layer = layer.to(memory_format=torch.channels_last)
    if which != "weight":
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    _assert_correct(path, layer, x, make_values(support), support)


@pytest.mark.parametrize("case", SOME)
@EVERY_PATH
def test_a_sample_without_a_batch(path, case):
    layer = CONVS[case].build()
    support = make_support(layer)
    x = CONVS[case].draw_input(samples=1).detach()[0].requires_grad_()
    _assert_correct(path, layer, x, make_values(support), support)


@EVERY_PATH
def test_no_samples(path):
    layer = CONVS["2d"].build()
    support = make_support(layer)
    x, values = CONVS["2d"].draw_input(samples=0), make_values(support)
    y = PATHS[path](layer, x, values, support)
    assert y.shape == layer(x).shape
    gradients = torch.autograd.grad(y.sum(), [x, values])
    assert gradients[0].shape == x.shape and not gradients[1].any()


@pytest.mark.parametrize("case", SOME)
@EVERY_PATH
def test_small_pieces_change_nothing(path, case, monkeypatch):
    """A large input is worked on a few samples and entries at a time."""
    monkeypatch.setattr(conv, "CHUNK_ELEMENTS", 50)
    layer = CONVS[case].build()
    support = make_support(layer)
    _assert_correct(path, layer, CONVS[case].draw_input(), make_values(support), support)


@pytest.mark.parametrize("form", SUPPORTS)
@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("path", ["bypass", "folded"])
def test_tap_by_tap_is_the_same(path, case, form, monkeypatch):
    """As where there are many entries per tap."""
    monkeypatch.setattr(conv, "ENTRIES_PER_TAP", 0)
    layer = CONVS[case].build()
    support = make_support(layer, form)
    _assert_correct(path, layer, CONVS[case].draw_input(), make_values(support), support)


@pytest.mark.parametrize("case", ["1d", "2d same, even kernel", "2d depthwise", "3d replicate, grouped"])
@EVERY_PATH
def test_gradients_are_derivatives(path, case):
    small = ConvCase(CONVS[case].dims, CONVS[case].options, CONVS[case].channels, (4, 4, 3))
    layer = small.build()
    support = make_support(layer, "ragged")

    def product(x, values):
        return PATHS[path](layer, x, values, support)

    inputs = small.draw_input(samples=1), make_values(support)
    assert torch.autograd.gradcheck(product, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(product, inputs, fast_mode=True)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", ["folded", "dense"])
def test_a_folded_weight_gets_its_bits_back(path, dtype, memory_format):
    layer = CONVS["2d"].build(dtype).to(memory_format=memory_format)
    original = bits(layer.weight)
    support = make_support(layer)
    y = PATHS[path](layer, CONVS["2d"].draw_input(dtype), make_values(support, dtype), support)
    assert_same_bits(layer.weight, original)
    y.sum().backward()
    assert_same_bits(layer.weight, original)


@pytest.mark.parametrize("path", ["folded", "dense"])
def test_a_folded_weight_gets_its_bits_back_after_an_error(path):
    layer = CONVS["2d"].build()
    original = bits(layer.weight)
    support = make_support(layer)
    with pytest.raises(RuntimeError):
        PATHS[path](layer, torch.randn(1, 3, 5, 5, dtype=torch.float64), make_values(support), support)
    assert_same_bits(layer.weight, original)


@EVERY_PATH
def test_a_trained_bias_gets_its_gradient(path):
    layer = CONVS["2d stride"].build()
    layer.bias.requires_grad_(True)
    support = make_support(layer)
    y = PATHS[path](layer, CONVS["2d stride"].draw_input(), make_values(support), support)
    y.sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full_like(layer.bias, y[:, 0].numel()))


@pytest.mark.parametrize("case", CONVS)
def test_a_geometry_survives_packing(case):
    geometry = ConvGeometry.of(CONVS[case].build())
    assert ConvGeometry.unpack(geometry.pack()) == geometry
