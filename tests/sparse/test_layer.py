"""One adapted layer in forward and backward: its paths, hooks, several adapters, mixed batches, autocast."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as global_hooks
from transformers.pytorch_utils import Conv1D

from peft_ext.sparse.ops import BACKENDS

from ._asserts import TOLERANCES, assert_all_close, dense_update
from ._inputs import adapt, random_linear


FAN_IN, ROWS = 9, 6
KINDS = pytest.mark.parametrize("kind", ["linear", "conv1d"])
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def _x(*tokens, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*tokens, FAN_IN, generator=generator).to(dtype).requires_grad_()


def _expected(layer, x, names):
    """Output of the adapters `names` together, by dense matrices in fp64."""
    matrix = layer.base_matrix().double()
    for name in names:
        delta = layer.deltas[name]
        matrix = matrix + dense_update(delta.weight.detach().double(), delta.support)
    return F.linear(x.detach().double(), matrix, layer.get_base_layer().bias.double())


def _results(layer, x, grad):
    """Output and gradients of x and of every adapter's values."""
    leaves = {"x": x} | {name: delta.weight for name, delta in layer.deltas.items() if delta.weight.requires_grad}
    y = layer(x)
    gradients = torch.autograd.grad(y, list(leaves.values()), grad)
    return {"output": y} | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


@KINDS
@EVERY_BACKEND
@pytest.mark.parametrize("k", [1, 2, FAN_IN])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_backend_gives_one_result(kind, backend, k, dtype):
    x, grad = _x(2, 5, dtype=dtype), torch.randn(2, 5, ROWS).to(dtype)
    layer = adapt(random_linear(FAN_IN, ROWS, kind, dtype), k, backend)
    results = _results(layer, x, grad)
    matrix = layer.base_matrix().double() + dense_update(layer.deltas["default"].weight.double(), _support(layer))
    flat = grad.double().flatten(0, -2)
    expected = {
        "output": _expected(layer, x, ["default"]),
        "gradient of x": grad.double() @ matrix,
        "gradient of default": _support(layer).gather(flat.t() @ x.double().flatten(0, -2)),
    }
    assert results["output"].dtype == dtype
    assert_all_close(results, expected, TOLERANCES[dtype])


def _support(layer, name="default"):
    return layer.deltas[name].support


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@EVERY_BACKEND
def test_zero_values_change_no_bit_of_a_forward(kind, backend, dtype):
    """In the bypass by construction; where W is composed, since W + 0 is W."""
    base = random_linear(FAN_IN, ROWS, kind, dtype)
    x = _x(2, 5, dtype=dtype)
    expected = base(x)
    layer = adapt(base, 2, backend, values_scale=0.0)
    if backend == "bypass":
        assert torch.equal(layer(x), expected)
    else:  # another kernel may sum in another order
        torch.testing.assert_close(layer(x), expected)


@EVERY_BACKEND
@pytest.mark.parametrize("active", [["a"], ["c"], ["b", "a"], ["a", "b", "c"]], ids="+".join)
@KINDS
def test_active_adapters_add_up(kind, backend, active):
    layer = adapt(random_linear(FAN_IN, ROWS, kind), 2, backend, adapters=("a", "b", "c"), active=active)
    x, grad = _x(2, 5), torch.randn(2, 5, ROWS)
    results = _results(layer, x, grad)
    assert set(results) == {"output", "gradient of x"} | {f"gradient of {name}" for name in active}
    torch.testing.assert_close(results["output"], _expected(layer, x, active).float())
    dense_gradient = grad.flatten(0, -2).t() @ x.flatten(0, -2)
    for name in active:
        torch.testing.assert_close(results[f"gradient of {name}"], _support(layer, name).gather(dense_gradient))


def test_an_active_name_that_this_layer_lacks_is_the_base_layer():
    layer = adapt(random_linear(FAN_IN, ROWS))
    layer._active_adapter = ["elsewhere"]
    x = _x(3)
    assert torch.equal(layer(x), layer.base_layer(x))


@EVERY_BACKEND
def test_disabled_is_the_base_layer_bit_for_bit(backend):
    layer = adapt(random_linear(FAN_IN, ROWS), 2, backend)
    x = _x(2, 5)
    adapted = layer(x)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not torch.equal(layer(x), adapted)
    layer.enable_adapters(True)
    assert torch.equal(layer(x), adapted)


@EVERY_BACKEND
@KINDS
def test_each_sample_of_a_mixed_batch_takes_its_adapter(kind, backend):
    layer = adapt(random_linear(FAN_IN, ROWS, kind), 2, backend, adapters=("a", "b"), active=["a"])
    names = ["b", "__base__", "a", "b", "a", "__base__"]
    x = _x(6, 4).detach()
    y = layer(x, adapter_names=names)
    for sample, name in enumerate(names):
        expected = _expected(layer, x[sample], [] if name == "__base__" else [name]).float()
        torch.testing.assert_close(y[sample], expected)
    only_base = ["__base__"] * 6
    assert torch.equal(layer(x, adapter_names=only_base), layer.base_layer(x))


def test_a_mixed_batch_needs_a_name_per_sample_unmerged_enabled_adapters():
    layer = adapt(random_linear(FAN_IN, ROWS))
    x = _x(3)
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
        calls.append("forward")
        return output + 1

    def forward_pre(module, args):
        calls.append("forward_pre")
        return (args[0] * 2,)

    def backward(module, grad_input, grad_output):
        calls.append("backward")
        return (grad_input[0] * 3,)

    def backward_pre(module, grad_output):
        calls.append("backward_pre")

    register = {
        "forward": (base.register_forward_hook, forward),
        "forward_pre": (base.register_forward_pre_hook, forward_pre),
        "backward": (base.register_full_backward_hook, backward),
        "backward_pre": (base.register_full_backward_pre_hook, backward_pre),
    }
    add, hook = register[what]
    return calls, add(hook)


@pytest.mark.parametrize("what", ["forward", "forward_pre", "backward", "backward_pre"])
@EVERY_BACKEND
@KINDS
def test_hooks_of_the_base_layer_fire_and_take_part(kind, backend, what):
    base = random_linear(FAN_IN, ROWS, kind)
    layer = adapt(base, 2, backend)
    x = _x(5)
    update = dense_update(layer.deltas["default"].weight.detach(), _support(layer))
    plain = layer(x).detach()
    calls, handle = _count_calls(base, what)
    y = layer(x)
    y.sum().backward()
    assert calls == [what]
    handle.remove()
    changed = {"forward": plain + 1, "forward_pre": base(2 * x) + x @ update.t()}
    torch.testing.assert_close(y, changed.get(what, plain))
    through_base = layer.base_matrix().sum(0) * {"forward_pre": 2, "backward": 3}.get(what, 1)
    torch.testing.assert_close(x.grad, (through_base + update.sum(0)).expand(5, -1))


@EVERY_BACKEND
def test_global_forward_hooks_see_the_base_layer(backend):
    """As profilers and summaries of models register them."""
    layer = adapt(random_linear(FAN_IN, ROWS), 2, backend)
    seen = []
    handle = global_hooks.register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    try:
        layer(_x(5))
    finally:
        handle.remove()
    assert nn.Linear in seen


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
        base = random_linear(FAN_IN, ROWS)
        plain = base.forward
        base.forward = lambda x: 2 * plain(x)
    else:
        base = _Doubling(FAN_IN, ROWS) if how == "subclass" else _DoublingConv1D(ROWS, FAN_IN)
        base.requires_grad_(False)
    layer = adapt(base, 2, backend)
    x = _x(5)
    update = dense_update(layer.deltas["default"].weight.detach(), _support(layer))
    torch.testing.assert_close(layer(x), base(x) + x @ update.t())


@EVERY_BACKEND
def test_a_base_weight_that_is_trained_too_gets_its_gradient(backend):
    base = random_linear(FAN_IN, ROWS)
    layer = adapt(base, 2, backend)
    base.requires_grad_(True)
    x = _x(5)
    layer(x).sum().backward()
    torch.testing.assert_close(base.weight.grad, x.detach().sum(0).expand(ROWS, -1))
    torch.testing.assert_close(base.bias.grad, torch.full((ROWS,), 5.0))


@EVERY_BACKEND
def test_a_trained_bias_over_a_frozen_weight_gets_its_gradient(backend):
    base = random_linear(FAN_IN, ROWS)
    layer = adapt(base, 2, backend)
    base.bias.requires_grad_(True)
    layer(_x(5)).sum().backward()
    torch.testing.assert_close(base.bias.grad, torch.full((ROWS,), 5.0))
    assert base.weight.grad is None


@EVERY_BACKEND
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@KINDS
def test_autocast_runs_the_base_in_16_bits_and_the_values_in_fp32(kind, backend, narrow):
    layer = adapt(random_linear(FAN_IN, ROWS, kind), 2, backend)
    x = _x(2, 5)
    with torch.autocast("cpu", dtype=narrow):
        y = layer(x)
        base = layer.base_layer(x)
    assert y.dtype == base.dtype == narrow
    update = dense_update(layer.deltas["default"].weight.detach(), _support(layer))
    torch.testing.assert_close(y, (base.float() + x @ update.t()).to(narrow))
    y.float().sum().backward()
    values = layer.deltas["default"].weight
    assert values.grad.dtype == torch.float32
    torch.testing.assert_close(values.grad, _support(layer).gather(x.detach().sum((0, 1)).expand(ROWS, -1)))
    torch.testing.assert_close(x.grad, (layer.base_matrix() + update).sum(0).expand(2, 5, -1), rtol=2e-2, atol=2e-2)


@EVERY_BACKEND
def test_extra_arguments_reach_the_base_layer(backend):
    class Scaled(nn.Linear):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    layer = adapt(Scaled(FAN_IN, ROWS).requires_grad_(False), 2, backend, values_scale=0.0)
    x = _x(3)
    assert torch.equal(layer(x, scale=3.0), layer.base_layer(x, scale=3.0))
    assert not torch.equal(layer(x, scale=3.0), layer(x))
