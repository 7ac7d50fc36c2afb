"""One adapted layer of every kind, in forward and backward: its paths, hooks, several adapters, mixed batches."""

import pytest
import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from transformers.pytorch_utils import Conv1D

from peft_ext.sparse.bases.neurons import is_plain
from peft_ext.sparse.ops import BACKENDS, folding
from tests._models.layers import KINDS, SOME

from ._asserts import TOLERANCES, assert_all_close, assert_layer_correct, dense_output, layer_and_dense_results
from ._inputs import adapt, random_linear


EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
SOME_KINDS = pytest.mark.parametrize("kind", SOME)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@EVERY_BACKEND
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_every_gradient_are_those_of_dense_weights(kind, backend):
    assert_layer_correct(adapt(KINDS[kind].build(), backend=backend), KINDS[kind].draw())


@EVERY_BACKEND
@SOME_KINDS
def test_every_k_and_dtype(kind, backend):
    for k, dtype in ((1, torch.float32), (2, torch.bfloat16), (2, torch.float16), (999, torch.float64)):
        assert_layer_correct(adapt(KINDS[kind].build(dtype), k, backend), KINDS[kind].draw(dtype))


def _changed_in_place(y, x):
    """As ConvBERT and the Mambas do with a layer's output."""
    y += x.mean()
    y[..., :2] *= 3
    return y.mul_(x.mean()).relu_()


@pytest.mark.parametrize("also", ["nothing", "the adapter's bias", "the base's bias", "the base"])
@EVERY_BACKEND
@SOME_KINDS
def test_whatever_is_trained_gets_its_gradient_and_the_output_may_be_changed_in_place(kind, backend, also):
    base = KINDS[kind].build()
    layer = adapt(base, backend=backend, train_bias=also == "the adapter's bias")
    base.bias.requires_grad_(also.startswith("the base"))
    base.weight.requires_grad_(also == "the base")
    for x in (KINDS[kind].draw(), KINDS[kind].draw().detach()[0].requires_grad_()):
        assert_layer_correct(layer, x, then=_changed_in_place)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_without_a_batch(kind):
    layer, x = adapt(KINDS[kind].build()), KINDS[kind].draw()
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@SOME_KINDS
def test_zero_values_change_no_bit_in_the_bypass(kind, dtype):
    base, x = KINDS[kind].build(dtype), KINDS[kind].draw(dtype)
    assert torch.equal(adapt(base, backend="bypass", values_scale=0.0)(x), base(x))


@pytest.mark.parametrize("active", [["c"], ["b", "a"], ["a", "b", "c"]], ids="+".join)
@EVERY_BACKEND
@SOME_KINDS
def test_active_adapters_add_up(kind, backend, active):
    layer = adapt(KINDS[kind].build(), 2, backend, adapters=("a", "b", "c"), active=active)
    results, expected = layer_and_dense_results(layer, KINDS[kind].draw())
    assert set(results) == {"output", "x"} | {f"neuroada_delta.{name}.weight" for name in active}
    assert_all_close(results, expected, TOLERANCES[torch.float64])


def test_an_active_name_that_this_layer_lacks_is_the_base_layer():
    layer, x = adapt(KINDS["Linear"].build()), KINDS["Linear"].draw()
    layer._active_adapter = ["elsewhere"]
    assert torch.equal(layer(x), layer.base_layer(x))


def test_a_mixed_batch_needs_a_name_per_sample_unmerged_enabled_adapters():
    layer, x = adapt(KINDS["Linear"].build()), KINDS["Linear"].draw()
    with pytest.raises(ValueError, match="2 and 3"):
        layer(x, adapter_names=["default"] * 2)
    layer.merge()
    with pytest.raises(ValueError, match="unmerge"):
        layer(x, adapter_names=["default"] * 3)
    layer.unmerge()
    layer.enable_adapters(False)
    with pytest.raises(ValueError, match="disabled"):
        layer(x, adapter_names=["default"] * 3)


def _count_calls(base, what):
    """Register a hook that counts, and takes part if its kind can; returns the count and the handle."""
    calls = []

    def forward(module, args, output):
        if module is base:
            calls.append(what)
            return output + 1

    def forward_pre(module, args):
        calls.append(what)
        return (args[0] * 2,)

    def backward(module, grad_input, grad_output):
        calls.append(what)
        return (grad_input[0] * 3,)

    def backward_pre(module, grad_output):
        calls.append(what)

    register = {
        "forward": (base.register_forward_hook, forward),
        "forward_pre": (base.register_forward_pre_hook, forward_pre),
        "backward": (base.register_full_backward_hook, backward),
        "backward_pre": (base.register_full_backward_pre_hook, backward_pre),
        "global forward": (global_hooks.register_module_forward_hook, forward),  # as profilers do
    }
    add, hook = register[what]
    return calls, add(hook)


@pytest.mark.parametrize("what", ["forward", "forward_pre", "backward", "backward_pre", "global forward"])
@SOME_KINDS
def test_hooks_of_the_base_layer_fire_and_take_part(kind, what):
    base, x = KINDS[kind].build(), KINDS[kind].draw()
    layer = adapt(base, backend="folded")  # which would not call it
    outputs = layer(x), base(x)
    plain, through_base = (torch.autograd.grad(y.sum(), x)[0] for y in outputs)
    more = base(2 * x) - outputs[1]
    calls, handle = _count_calls(base, what)
    y = layer(x)
    y.sum().backward()
    handle.remove()
    assert calls == [what] and is_plain(base) == (kind != "dynamic")  # again
    changed = {"forward": outputs[0] + 1, "global forward": outputs[0] + 1, "forward_pre": outputs[0] + more}
    torch.testing.assert_close(y, changed.get(what, outputs[0]))
    factor = {"forward_pre": 2, "backward": 3}.get(what, 1)
    torch.testing.assert_close(x.grad, plain + (factor - 1) * through_base)


class _Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class _DoublingConv1D(Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


@EVERY_BACKEND
@pytest.mark.parametrize("how", ["subclass", "conv1d subclass", "replaced forward"])
def test_a_base_layer_that_does_more_is_called(backend, how):
    if how == "replaced forward":  # as accelerate's offloading does
        base = random_linear(9, 6)
        plain = base.forward
        base.forward = lambda x: 2 * plain(x)
    else:
        base = _Doubling(9, 6) if how == "subclass" else _DoublingConv1D(6, 9)
        base.requires_grad_(False)
    layer, x = adapt(base, 2, backend), torch.randn(5, 9)
    update = layer.get_delta_weight("default")
    torch.testing.assert_close(layer(x), base(x) + x @ (update if how == "conv1d subclass" else update.t()))


@pytest.mark.parametrize("backend", ["auto", "folded"])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@SOME_KINDS
def test_autocast_runs_the_base_in_16_bits_and_the_values_in_fp32(kind, backend, narrow):
    base, x = KINDS[kind].build(torch.float32), KINDS[kind].draw(torch.float32)
    layer = adapt(base, 2, backend)
    with torch.autocast("cpu", dtype=narrow):
        (results, expected), plain = layer_and_dense_results(layer, x), base(x)
    assert results["output"].dtype == plain.dtype == narrow
    update = (dense_output(layer, x, ["default"]) - dense_output(layer, x, [])).detach()
    torch.testing.assert_close(results["output"], (plain.double() + update).to(narrow))
    values = "neuroada_delta.default.weight"
    assert results[values].dtype == results["x"].dtype == torch.float32
    assert_all_close({values: results[values]}, {values: expected[values]}, TOLERANCES[torch.float32])
    assert_all_close({"x": results["x"]}, {"x": expected["x"]}, TOLERANCES[narrow])


def test_extra_arguments_reach_the_base_layer():
    class Scaled(nn.Linear):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    layer, x = adapt(Scaled(9, 6).requires_grad_(False), values_scale=0.0), torch.randn(3, 9)
    assert torch.equal(layer(x, scale=3.0), layer.base_layer(x, scale=3.0))
    assert not torch.equal(layer(x, scale=3.0), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["2d", "2d, channels last", "2d without bias", "2d circular, same", "2d depthwise"])
def test_auto_computes_the_same_bits_without_gradients_on_a_convolution(kind, dtype, monkeypatch):
    """As with them, where the values are written into the weight; that must not be done where threads may share it."""
    layer, x = adapt(KINDS[kind].build(dtype), k=1), KINDS[kind].draw(dtype).detach()
    for inputs in (x, x[0]):
        with_gradients = layer(inputs)
        assert with_gradients.requires_grad
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(folding, "why_not_ours", lambda *_: pytest.fail("folded into the weight"))
            assert torch.equal(layer(inputs), with_gradients)
