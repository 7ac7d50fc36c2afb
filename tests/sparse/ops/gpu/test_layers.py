"""Layers on the Triton kernels, in the interpreter: in place where nobody notices, right where somebody might."""

import functools

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from peft_ext.sparse.ops import gpu, may_add_in_place

from ..._inputs import adapt, random_linear


pytestmark = pytest.mark.usefixtures("on_interpreter")


def _save_products(context, op, *args, **kwargs):
    saved = {torch.ops.aten.addmm.default, torch.ops.aten.mm.default}
    return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE


CALLS = {
    "reentrant": lambda layer, x: checkpoint(layer, x, use_reentrant=True),
    "non-reentrant": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
    "selective": lambda layer, x: checkpoint(
        layer,
        x,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, _save_products),
    ),
}


def _gradients(call, layer, x):
    x = x.detach().requires_grad_()
    values = layer.deltas["default"].weight
    values.grad = None
    out = call(layer, x)
    out.square().sum().backward()
    return [out.detach(), x.grad, values.grad]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_checkpointing_changes_no_bit(call, kind):
    layer = adapt(random_linear(9, 6, kind, torch.bfloat16), k=2)
    x = torch.randn(2, 3, 9).to(torch.bfloat16)
    plain = _gradients(lambda layer, x: layer(x), layer, x)
    for found, expected in zip(_gradients(call, layer, x), plain, strict=True):
        assert torch.equal(found, expected)


def test_autocast_adds_to_the_narrow_output_from_the_wide_input():
    layer = adapt(random_linear(9, 6), k=2, backend="bypass")
    x = torch.randn(5, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, *gradients = _gradients(lambda layer, x: layer(x), layer, x)
    base = layer.base_layer
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = base(x)
    update = layer.get_delta_weight("default").detach()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, (plain.double() + x.double() @ update.double().t()).to(torch.bfloat16))
    assert [gradient.dtype for gradient in gradients] == [torch.float32, torch.float32]


def test_a_batch_of_gradients_is_that_of_each_one():
    layer = adapt(random_linear(9, 6), k=2, backend="bypass")
    x, grads = torch.randn(2, 3, 9).requires_grad_(), torch.randn(4, 2, 3, 6)
    inputs = (x, layer.deltas["default"].weight)
    together = torch.autograd.grad(layer(x), inputs, grads, is_grads_batched=True)
    one_by_one = zip(*(torch.autograd.grad(layer(x), inputs, grad) for grad in grads), strict=True)
    for batch, each in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(batch, torch.stack(each))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_base_layers_output_is_overwritten(kind, monkeypatch):
    layer = adapt(random_linear(9, 6, kind, torch.bfloat16), k=2)
    outputs = []
    forward = type(layer.base_layer).forward
    monkeypatch.setattr(type(layer.base_layer), "forward", lambda *args: outputs.append(forward(*args)) or outputs[-1])
    out = layer(torch.randn(2, 3, 9).to(torch.bfloat16).requires_grad_())
    assert out.data_ptr() == outputs[0].data_ptr()
    assert "CopySlices" not in out.grad_fn.name() and "CopySlices" not in out.grad_fn.next_functions[0][0].name()


def test_hooks_on_the_base_layer_see_its_own_output():
    layer = adapt(random_linear(9, 6, "linear", torch.bfloat16), k=2)
    x = torch.randn(5, 9).to(torch.bfloat16)
    seen = []
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    expected = layer.base_layer(x)
    layer(x)
    assert torch.equal(seen[1], expected)


def test_who_may_keep_a_result_is_not_overwritten():
    x, values = torch.randn(5, 9), torch.randn(6, 2)
    leaf, fresh = torch.randn(5, 6, requires_grad=True), torch.randn(5, 6)
    assert may_add_in_place(fresh, x, values)
    assert not may_add_in_place(leaf, x, values)
    assert not may_add_in_place(torch.randn(6, 5).t(), x, values)
    assert not may_add_in_place(torch.randn(10, 6)[:5], x, values)
    assert not may_add_in_place(fresh.double(), x, values)
    with FlopCounterMode(display=False):  # a mode that sees operators, as selective checkpointing's
        assert not may_add_in_place(fresh, x, values)
    seen = []
    torch.func.vmap(lambda x: seen.append(may_add_in_place(fresh, x, values)) or x)(x[None])
    assert seen == [False]


def test_cpu_tensors_are_left_to_pytorch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "usable", _unpatched_usable)
        assert not may_add_in_place(torch.randn(5, 6), torch.randn(5, 9), torch.randn(6, 2))


_unpatched_usable = gpu.usable


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_inference_gives_the_same_bits(kind, mode):
    layer = adapt(random_linear(9, 6, kind, torch.bfloat16), k=2)
    x = torch.randn(2, 3, 9).to(torch.bfloat16)
    expected = layer(x)
    with mode():
        assert torch.equal(layer(x), expected)
