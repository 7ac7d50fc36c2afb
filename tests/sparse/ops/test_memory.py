"""What bypass and folded layers do not do: allocate a tensor as large as the weight, or keep more than x."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_ext import NeuroAdaConfig

from .._inputs import adapt, random_linear
from .._probes import LargestAllocation, saved_for_backward


ROWS, FAN_IN = 192, 256


def _largest_allocation(backend, kind, k, tokens, dtype=torch.float32, x_requires_grad=True, selection="random"):
    base = random_linear(FAN_IN, ROWS, kind, dtype)
    layer = adapt(base, k=k, backend=backend, selection=selection)
    x = torch.randn(2, tokens, FAN_IN, dtype=dtype, requires_grad=x_requires_grad)
    with LargestAllocation() as counter:
        layer(x).backward(torch.ones(2, tokens, ROWS, dtype=dtype))
    assert layer.deltas["default"].weight.grad.abs().max() > 0
    return counter


@pytest.mark.parametrize("x_requires_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("k", [1, 20])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("backend", ["bypass", "folded"])
@pytest.mark.parametrize("selection", ["random", "random_layer"])
def test_nothing_as_large_as_the_weight_is_allocated(backend, kind, k, tokens, dtype, x_requires_grad, selection):
    counter = _largest_allocation(backend, kind, k, tokens, dtype, x_requires_grad, selection)
    assert counter.elements < ROWS * FAN_IN
    # The products really ran under the counter, and it looked inside them.
    forward_op = {"bypass": "bypass_linear", "folded": "folded_linear"}[backend]
    assert {f"peft_ext::{forward_op}", "peft_ext::sparse_grad_values"} <= counter.entered


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("backend", ["dense", "reference"])
def test_the_counter_notices_a_dense_tensor(backend, kind):
    assert _largest_allocation(backend, kind, 1, 2).elements >= ROWS * FAN_IN


def test_the_counter_sees_the_transient_of_a_custom_op_in_forward_alone():
    layer = adapt(random_linear(FAN_IN, ROWS), k=1, backend="dense")
    with LargestAllocation() as counter:
        layer(torch.randn(1, FAN_IN))
    assert counter.elements == ROWS * FAN_IN


def _saved(model, x):
    with saved_for_backward(model) as saved:
        y = model(x)
        sizes = dict(saved)
    y.sum().backward()
    return sizes


@pytest.mark.parametrize("x_requires_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 20])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("backend", ["bypass", "folded", "dense"])
@pytest.mark.parametrize("selection", ["random", "random_layer"])
def test_only_x_is_saved_for_backward(backend, kind, k, dtype, x_requires_grad, selection):
    layer = adapt(random_linear(FAN_IN, ROWS, kind, dtype), k=k, backend=backend, selection=selection)
    x = torch.randn(3, 5, FAN_IN, dtype=dtype, requires_grad=x_requires_grad)
    saved = _saved(layer, x)
    assert saved == {x.untyped_storage().data_ptr(): x.nbytes}


def test_the_probe_notices_what_else_is_saved():
    """The dense oracle keeps its composed weight."""
    layer = adapt(random_linear(FAN_IN, ROWS), k=1, backend="reference")
    x = torch.randn(3, 5, FAN_IN, requires_grad=True)
    assert sum(_saved(layer, x).values()) >= x.nbytes + 4 * ROWS * FAN_IN


@pytest.mark.parametrize("backend", ["bypass", "folded"])
def test_nothing_is_saved_where_nothing_is_trained(backend):
    """A frozen adapter in the middle of a model: x's gradient needs the weight and the values, not x."""
    layer = adapt(random_linear(FAN_IN, ROWS), k=2, backend=backend)
    layer.requires_grad_(False)
    x = torch.randn(5, FAN_IN, requires_grad=True)
    assert _saved(layer, x) == {}
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("backend", "k", "dtype"),
    [(backend, k, torch.float32) for backend in ("auto", "bypass", "folded") for k in (1, 20)]
    + [("auto", 1, torch.bfloat16)],
)
def test_a_layer_saves_no_more_than_lora(backend, k, dtype):
    """At 2048x2048, rank 8, as the issue asks."""
    width, tokens = 2048, 16

    def saved_bytes(config):
        model = get_peft_model(nn.Sequential(nn.Linear(width, width, dtype=dtype)), config)
        return sum(_saved(model, torch.randn(tokens, width, dtype=dtype, requires_grad=True)).values())

    ours = saved_bytes(NeuroAdaConfig(k=k, backend=backend, target_modules=["0"]))
    lora = saved_bytes(LoraConfig(r=8, target_modules=["0"]))
    assert ours == tokens * width * dtype.itemsize
    assert ours <= lora
