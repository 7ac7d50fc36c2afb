"""What bypass and folded layers do not do: allocate a tensor as large as the weight, or keep more than x."""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_ext import NeuroAdaConfig
from tests._models.layers import Kind

from .._inputs import adapt
from .._probes import LargestAllocation, saved_for_backward


LAYERS = {
    "Linear": Kind(lambda: nn.Linear(256, 192), (20, 256)),
    "Conv1D": Kind(lambda: Conv1D(192, 256), (20, 256)),
    "Linear, few tokens": Kind(lambda: nn.Linear(256, 192), (2, 256)),
    "Conv2d": Kind(lambda: nn.Conv2d(96, 96, 3, padding=1), (96, 8, 8)),
    "Conv2d grouped": Kind(lambda: nn.Conv2d(96, 96, 3, padding=1, groups=2), (96, 8, 8)),
}
EVERY_KIND = pytest.mark.parametrize("kind", LAYERS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SELECTIONS = pytest.mark.parametrize("selection", ["random", "random_layer"])


def _made(kind, backend, dtype=torch.float32, x_requires_grad=True, selection="random"):
    k = 2 if kind.startswith("Conv2d") else 20 if "few" in kind else 1
    layer = adapt(LAYERS[kind].build(dtype), k=k, backend=backend, selection=selection)
    return layer, LAYERS[kind].draw(dtype, samples=2).requires_grad_(x_requires_grad)


def _largest_allocation(layer, x):
    y = layer(x)  # makes the tables
    with LargestAllocation() as counter:
        layer(x).backward(torch.ones_like(y))
    assert layer.deltas["default"].weight.grad.abs().max() > 0
    assert counter.elements >= y.numel()
    return counter


@pytest.mark.parametrize("x_requires_grad", [True, False])
@DTYPES
@pytest.mark.parametrize(("kind", "backend"), [*itertools.product(LAYERS, ("bypass", "folded")), ("Conv2d", "auto")])
@SELECTIONS
def test_nothing_as_large_as_the_weight_is_allocated(kind, backend, dtype, x_requires_grad, selection):
    layer, x = _made(kind, backend, dtype, x_requires_grad, selection)
    counter = _largest_allocation(layer, x)
    assert counter.elements < layer.base_layer.weight.numel()  # as the windows of a convolution would be, too
    # The products really ran under the counter, and it looked inside them.
    assert backend == "auto" or any(name.startswith(f"peft_ext::{backend}_") for name in counter.entered)
    assert any(name.endswith("grad_values") for name in counter.entered)


@EVERY_KIND
@pytest.mark.parametrize("backend", ["dense", "reference"])
def test_the_counter_notices_a_dense_tensor(backend, kind):
    layer, x = _made(kind, backend)
    assert _largest_allocation(layer, x).elements >= layer.base_layer.weight.numel()


def test_the_counter_sees_the_transient_of_a_custom_op_in_forward_alone():
    layer, x = _made("Linear", "dense")
    with LargestAllocation() as counter:
        layer(x)
    assert counter.elements == layer.base_layer.weight.numel()


def _saved(model, x):
    with saved_for_backward(model) as saved:
        y = model(x)
        sizes = dict(saved)
    y.sum().backward()
    return sizes


@pytest.mark.parametrize("x_requires_grad", [True, False])
@DTYPES
@EVERY_KIND
@pytest.mark.parametrize("backend", ["auto", "bypass", "folded", "dense"])
@SELECTIONS
def test_only_x_is_saved_for_backward(backend, kind, dtype, x_requires_grad, selection):
    layer, x = _made(kind, backend, dtype, x_requires_grad, selection)
    saved = _saved(layer, x)
    saved.pop(layer.deltas["default"].transposed_offsets.untyped_storage().data_ptr(), None)  # of a convolution
    assert saved == {x.untyped_storage().data_ptr(): x.nbytes}


def test_the_probe_notices_what_else_is_saved():
    """The dense oracle keeps its composed weight."""
    layer, x = _made("Linear", "reference")
    assert sum(_saved(layer, x).values()) >= x.nbytes + layer.base_layer.weight.nbytes


@pytest.mark.parametrize("backend", ["bypass", "folded"])
def test_nothing_is_saved_where_nothing_is_trained(backend):
    """A frozen adapter in the middle of a model: x's gradient needs the weight and the values, not x."""
    layer, x = _made("Linear", backend)
    layer.requires_grad_(False)
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
