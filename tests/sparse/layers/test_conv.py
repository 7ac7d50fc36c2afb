"""Adapted convolutions: forward and backward of the layer, several adapters, merging, memory."""

import importlib
import threading

import pytest
import torch
from torch import nn

from peft_ext.sparse.ops import BACKENDS, choose_conv_backend, folding

from .._asserts import TOLERANCES, assert_all_close, assert_same_bits, bits
from .._convs import CONVS, dense_conv
from .._inputs import adapt
from .._probes import LargestAllocation, saved_for_backward


EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EVERY_CONV = pytest.mark.parametrize("case", CONVS)
SOME = pytest.mark.parametrize("case", ["1d circular, grouped", "2d same, even kernel", "2d depthwise", "3d"])
FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
FOLDED_CONV = importlib.import_module("peft_ext.sparse.ops.folded_conv")  # its package has a function of that name
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def _expected(layer, x, names):
    """By torch's convolution with the adapters' dense updates."""
    weight = layer.get_base_layer().weight + sum(layer.get_delta_weight(name).detach() for name in names)
    return dense_conv(layer.get_base_layer(), x, weight)


@EVERY_CONV
@EVERY_BACKEND
def test_every_backend_gives_one_result(backend, case):
    layer, x = adapt(CONVS[case].build(), backend=backend), CONVS[case].draw_input()
    y = layer(x)
    assert layer.get_delta_weight("default").shape == layer.get_base_layer().weight.shape
    weight = (layer.get_base_layer().weight + layer.get_delta_weight("default")).requires_grad_()
    expected = dense_conv(layer.get_base_layer(), x, weight)
    grad = torch.randn_like(expected)
    through = torch.autograd.grad(expected, [x, weight], grad)
    values = layer.deltas["default"]
    wanted = {"output": expected.detach(), "x": through[0], "values": values.support.gather(through[1].flatten(1))}
    results = dict(zip(("x", "values"), torch.autograd.grad(y, [x, values.weight], grad), strict=True))
    assert_all_close({"output": y.detach(), **results}, wanted, TOLERANCES[torch.float64])


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["2d", "2d without bias", "2d circular, same", "2d depthwise"])
def test_auto_computes_the_same_bits_without_gradients(case, dtype, memory_format, monkeypatch):
    """As with them, where the values are written into the weight; that must not be done where threads may share it."""
    base = CONVS[case].build(dtype).to(memory_format=memory_format)
    layer, x = adapt(base, k=1), CONVS[case].draw_input(dtype).detach()
    for inputs in (x, x[0]):
        with_gradients = layer(inputs)
        assert with_gradients.requires_grad
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(FOLDED_CONV, "folded_in", lambda *_: pytest.fail("folded into the weight"))
            assert torch.equal(layer(inputs), with_gradients)


def test_auto_copies_small_weights_only_and_only_without_gradients():
    def choose(channels=8, dtype=torch.float32, device="cpu", requested="auto"):
        weight = torch.empty(channels, channels, 1, dtype=dtype, device=device)
        return choose_conv_backend(requested, torch.empty(1, channels, 1, dtype=dtype), weight, channels)

    with torch.no_grad():
        assert choose() == choose(1024) == choose(dtype=torch.float64) == "copied"
        assert choose(1025) == choose(dtype=torch.bfloat16) == choose(device="meta") == "bypass"
        assert choose(requested="folded") == "folded"
        assert torch.vmap(lambda _: torch.tensor(choose() == "reference"))(torch.zeros(2)).all()
    assert choose(1024) == "folded"


@SOME
@EVERY_BACKEND
def test_active_adapters_add_up(backend, case):
    layer, x = adapt(CONVS[case].build(), 2, backend, ("a", "b", "c")), CONVS[case].draw_input()
    for active in (["a"], ["c", "b"], ["a", "b", "c"]):
        layer.set_adapter(active)
        torch.testing.assert_close(layer(x), _expected(layer, x, active))


@SOME
@EVERY_BACKEND
def test_disabled_is_the_base_layer_bit_for_bit(backend, case):
    layer, x = adapt(CONVS[case].build(), 2, backend), CONVS[case].draw_input()
    adapted = layer(x)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x)) and not torch.equal(layer(x), adapted)
    layer.enable_adapters(True)
    assert torch.equal(layer(x), adapted)


@DTYPES
@SOME
def test_zero_values_change_no_bit_in_the_bypass(case, dtype):
    base, x = CONVS[case].build(dtype), CONVS[case].draw_input(dtype)
    layer = adapt(base, 2, "bypass", values_scale=0.0)
    assert torch.equal(layer(x), base(x))


@SOME
@EVERY_BACKEND
def test_each_sample_of_a_mixed_batch_takes_its_adapter(backend, case):
    layer = adapt(CONVS[case].build(), 2, backend, ("a", "b"))
    names = ["b", "__base__", "a", "b"]
    x = CONVS[case].draw_input(samples=4).detach()
    y = layer(x, adapter_names=names)
    for sample, name in enumerate(names):
        expected = _expected(layer, x[sample : sample + 1], [] if name == "__base__" else [name])
        torch.testing.assert_close(y[sample : sample + 1], expected)


@FORMATS
@DTYPES
@pytest.mark.parametrize("selection", ["random", "random_layer"])
def test_merging_and_unmerging_restores_every_bit(selection, dtype, memory_format):
    base = CONVS["2d grouped"].build(dtype).to(memory_format=memory_format)
    layer = adapt(base, 2, adapters=("a", "b", "c"), selection=selection)
    original = bits(base.weight)
    for _ in range(3):
        layer.merge()
        assert layer.merged_adapters == ["a", "b", "c"]
        layer.unmerge(["b"])
        layer.unmerge()
        assert_same_bits(base.weight, original)
    assert base.weight.is_contiguous(memory_format=memory_format)


@FORMATS
@EVERY_BACKEND
def test_the_merged_layer_computes_what_the_adapters_do(backend, memory_format):
    base = CONVS["2d"].build(torch.float32).to(memory_format=memory_format)
    layer, x = adapt(base, 2, backend, ("a", "b")), CONVS["2d"].draw_input(torch.float32)
    expected = layer(x).detach()
    layer.merge(safe_merge=True)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(base(x), expected)


@FORMATS
def test_a_safe_merge_that_fails_changes_nothing(memory_format):
    base = CONVS["2d"].build(torch.float32).to(memory_format=memory_format)
    layer = adapt(base, 2, adapters=("a", "b"))
    layer.deltas["b"].weight.data[0, 0] = torch.nan
    original = bits(base.weight)
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert_same_bits(base.weight, original)


@pytest.mark.parametrize("what", ["forward", "forward_pre"])
@EVERY_BACKEND
def test_hooks_of_the_base_layer_take_part(backend, what):
    base, x = CONVS["2d"].build(), CONVS["2d"].draw_input()
    layer = adapt(base, 2, backend)
    plain = layer(x).detach()
    if what == "forward":
        handle = base.register_forward_hook(lambda module, args, output: output + 1)
        expected = plain + 1
    else:
        handle = base.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        expected = plain + base.forward(x)
        expected = expected - torch.nn.functional.conv2d(torch.zeros_like(x), base.weight, base.bias, padding=1)
    torch.testing.assert_close(layer(x), expected)
    handle.remove()


@EVERY_BACKEND
def test_a_base_weight_that_is_trained_too_gets_its_gradient(backend):
    base, x = CONVS["2d stride"].build(), CONVS["2d stride"].draw_input()
    layer = adapt(base, 2, backend, values_scale=0.0)
    base.requires_grad_(True)
    layer(x).sum().backward()
    got = base.weight.grad.clone()
    base.weight.grad = None
    base(x).sum().backward()
    torch.testing.assert_close(got, base.weight.grad)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@EVERY_BACKEND
def test_autocast_runs_the_base_in_16_bits_and_the_values_in_fp32(backend, narrow):
    base, x = CONVS["2d"].build(torch.float32), CONVS["2d"].draw_input(torch.float32)
    layer = adapt(base, 2, backend)
    with torch.autocast("cpu", dtype=narrow):
        y, plain = layer(x), base(x)
    assert y.dtype == plain.dtype == narrow
    update = torch.nn.functional.conv2d(x, layer.get_delta_weight("default"), padding=1)
    torch.testing.assert_close(y, (plain.float() + update).to(narrow))
    y.float().sum().backward()
    assert layer.deltas["default"].weight.grad.dtype == torch.float32


# ------------------------------------------------------------------ memory


def _large(groups=1):
    return nn.Conv2d(96, 96, 3, padding=1, groups=groups).requires_grad_(False)


@pytest.mark.parametrize("backend", ["auto", "bypass", "folded"])
@pytest.mark.parametrize("needs_input_gradient", [False, True])
def test_no_tensor_as_large_as_the_weight(backend, needs_input_gradient):
    base = _large()
    layer = adapt(base, 2, backend)
    x = torch.randn(2, 96, 6, 6, requires_grad=needs_input_gradient)
    y = layer(x)
    with LargestAllocation() as allocation:
        layer(x).backward(torch.ones_like(y))
    seen = layer.deltas["default"].weight.numel() * 2 * 6 * 6  # what all entries see; padded inputs are smaller
    assert allocation.entered >= {"peft_ext::bypass_conv" if backend == "bypass" else "peft_ext::folded_conv"}
    assert y.numel() <= allocation.elements <= seen < base.weight.numel() / 4


def test_the_dense_path_makes_one_weight_gradient():
    base = _large()
    layer = adapt(base, 2, "dense")
    x = torch.randn(2, 96, 6, 6)
    with LargestAllocation() as allocation:
        layer(x).sum().backward()
    assert allocation.elements == base.weight.numel()


@pytest.mark.parametrize("backend", ["auto", "bypass", "folded", "dense"])
def test_only_x_is_saved_for_backward(backend):
    layer = adapt(_large(groups=2), 2, backend)
    x = torch.randn(2, 96, 6, 6)
    with saved_for_backward(layer) as saved:
        y = layer(x)
    tables = layer.deltas["default"].transposed_offsets.untyped_storage().data_ptr()
    assert y.requires_grad and {address for address in saved if address != tables} == {x.data_ptr()}


def test_a_copy_waits_for_another_threads_folding():
    weight = torch.randn(4, 2, 3)
    before, copied = weight.clone(), []
    thread = threading.Thread(target=lambda: copied.append(folding.copy_of(weight)))
    with folding.folded_in(weight, torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.int32), None):
        assert not torch.equal(weight, before)
        thread.start()
        thread.join(0.2)
        assert not copied
    thread.join()
    assert torch.equal(copied[0], before)
