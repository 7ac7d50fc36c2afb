"""Training an adapted layer: the base never moves, whoever looks at it sees the original."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_ext.sparse.ops import BACKENDS

from ._asserts import assert_same_bits, bits
from ._inputs import adapt, random_linear
from ._probes import tensors_of


WIDTH = 16
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
KINDS = pytest.mark.parametrize("kind", ["linear", "conv1d"])


def _network(backend, kind="linear", dtype=torch.float32, k=2):
    layers = [adapt(random_linear(WIDTH, WIDTH, kind, dtype, seed), k, backend) for seed in (1, 2)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def _base_bits(network):
    return {name: bits(tensor) for name, tensor in network.state_dict().items() if "base_layer" in name}


def _assert_base_is(network, expected):
    now = {name: tensor for name, tensor in network.state_dict().items() if "base_layer" in name}
    assert set(now) == set(expected) and now
    for name, tensor in now.items():
        assert_same_bits(tensor, expected[name])


@EVERY_BACKEND
@pytest.mark.parametrize(("kind", "dtype"), [("linear", torch.float32), ("conv1d", torch.bfloat16)], ids=str)
def test_adamw_with_weight_decay_moves_no_bit_of_the_base(backend, kind, dtype):
    """60 steps over all parameters, as a Trainer hands them over."""
    network = _network(backend, kind, dtype)
    original = _base_bits(network)
    start = copy.deepcopy([layer.deltas["default"].weight for layer in (network[0], network[2])])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)
    x = torch.randn(8, WIDTH).to(dtype)
    target = torch.randn(8, WIDTH).to(dtype)
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    _assert_base_is(network, original)
    assert losses[-1] < 0.9 * losses[0]
    for before, layer in zip(start, (network[0], network[2]), strict=True):
        assert (layer.deltas["default"].weight != before).float().mean() > 0.9


@EVERY_BACKEND
@pytest.mark.parametrize("use_reentrant", [False, True])
@KINDS
def test_gradient_checkpointing_gives_the_same_gradients(kind, backend, use_reentrant):
    x = torch.randn(3, 5, WIDTH, requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        network = _network(backend, kind)
        original = _base_bits(network)
        y = checkpoint(network, x, use_reentrant=use_reentrant) if checkpointed else network(x)
        values = [layer.deltas["default"].weight for layer in (network[0], network[2])]
        y.square().sum().backward()
        gradients.append([x.grad, *(value.grad for value in values)])
        x.grad = None
        _assert_base_is(network, original)
    for plain, again in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        # Not bit for bit: "auto" takes the bypass in the first forward of a reentrant checkpoint, which has no graph.
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-4)


def _saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": _saved_and_loaded,
}


@pytest.mark.parametrize("how", COPIES)
@EVERY_BACKEND
@KINDS
def test_a_copy_between_forward_and_backward_sees_the_original(kind, backend, how):
    network = _network(backend, kind)
    original = _base_bits(network)
    x = torch.randn(5, WIDTH, requires_grad=True)
    y = network(x)
    other = COPIES[how](network)
    y.sum().backward()
    _assert_base_is(other, original)
    _assert_base_is(network, original)
    assert torch.equal(other(x), network(x))
    copied = tensors_of(other)
    for name, mine in tensors_of(network).items():
        assert torch.equal(mine, copied[name]) and mine.data_ptr() != copied[name].data_ptr(), name


@EVERY_BACKEND
def test_hooks_during_backward_see_the_original(backend):
    """Gradients of x and of values run between the products of one layer's backward."""
    network = _network(backend)
    original = _base_bits(network)
    x = torch.randn(5, WIDTH, requires_grad=True)
    calls = []

    def look(_):
        calls.append(1)
        _assert_base_is(network, original)

    x.register_hook(look)
    for layer in (network[0], network[2]):
        layer.deltas["default"].weight.register_hook(look)
    hidden = network[1](network[0](x))
    hidden.register_hook(look)
    network[2](hidden).sum().backward()
    assert len(calls) == 4


@EVERY_BACKEND
def test_backward_twice_through_one_graph_accumulates(backend):
    network = _network(backend)
    y = network(torch.randn(5, WIDTH)).sum()
    y.backward(retain_graph=True)
    values = network[0].deltas["default"].weight
    once = values.grad.clone()
    y.backward()
    torch.testing.assert_close(values.grad, 2 * once)


@EVERY_BACKEND
def test_two_forwards_before_their_backwards(backend):
    """As with gradient accumulation over a shared layer, or a layer that is called twice."""
    layer = adapt(random_linear(WIDTH, WIDTH), 2, backend)
    values = layer.deltas["default"].weight
    first, second = torch.randn(5, WIDTH), torch.randn(5, WIDTH)
    alone = [torch.autograd.grad(layer(layer(x)).sum(), values)[0] for x in (first, second)]
    outputs = [layer(layer(x)).sum() for x in (first, second)]
    for y in outputs:
        y.backward()
    torch.testing.assert_close(values.grad, alone[0] + alone[1])


@EVERY_BACKEND
def test_values_changed_after_forward_are_noticed_in_backward(backend):
    """Values are saved as they were: silently using newer ones would be a wrong gradient of x."""
    layer = adapt(random_linear(WIDTH, WIDTH), 2, backend)
    y = layer(torch.randn(5, WIDTH, requires_grad=True))
    with torch.no_grad():
        layer.deltas["default"].weight.add_(1)
    if backend == "reference":  # saves a copy composed of them
        y.sum().backward()
        return
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


@EVERY_BACKEND
def test_no_gradient_is_kept_under_no_grad_or_without_trained_values(backend):
    layer = adapt(random_linear(WIDTH, WIDTH), 2, backend)
    x = torch.randn(5, WIDTH)
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        inferred = layer(x)
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    torch.testing.assert_close(layer(x), inferred.clone())
