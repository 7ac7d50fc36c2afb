"""The folded path: nobody outside the op ever sees another weight than the original, bit for bit."""

import threading

import pytest
import torch
import torch.nn.functional as F

from peft_ext.sparse.ops import folded
from peft_ext.sparse.ops.folding import copy_of, folded_in

from .._asserts import (
    TOLERANCES,
    assert_all_close,
    assert_product_correct,
    assert_same_bits,
    bits,
    reference_results,
    results_of,
)
from .._inputs import SHAPES, Shape, make_inputs


def _folded(inputs):
    support = inputs.support
    return folded(inputs.x, inputs.weight, inputs.bias, inputs.values, support.indices, support.offsets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30, -0.0], ids=str)
@pytest.mark.parametrize("shape", ["k2", "ragged"])
def test_any_values_are_taken_out_again(value, dtype, shape):
    """W + v − v would not bring W back."""
    inputs = make_inputs(SHAPES[shape], dtype, torch.float32)
    inputs.values.data.fill_(value)
    inputs.weight[0, :4] = torch.tensor([0.0, -0.0, torch.finfo(dtype).tiny, torch.finfo(dtype).max], dtype=dtype)
    original = bits(inputs.weight)
    _folded(inputs).backward(inputs.grad)
    assert_same_bits(inputs.weight, original)


BAD_ARGUMENTS = {
    "x": lambda inputs: {"x": torch.randn(4, 8, dtype=torch.float64)},
    "dtype of x": lambda inputs: {"x": torch.randn(4, 9, dtype=torch.float32)},
    "bias": lambda inputs: {"bias": torch.randn(5, dtype=torch.float64)},
    "values": lambda inputs: {"values": torch.randn(6, 3, dtype=torch.float64)},
    "indices": lambda inputs: {"indices": torch.full((6, 2), 9, dtype=torch.int32)},
}


@pytest.mark.parametrize("what", BAD_ARGUMENTS)
def test_an_error_in_forward_restores_every_bit(what):
    inputs = make_inputs(SHAPES["k2"])
    arguments = {"x": inputs.x, "bias": inputs.bias, "values": inputs.values, "indices": inputs.support.indices}
    arguments.update(BAD_ARGUMENTS[what](inputs))
    original = bits(inputs.weight)
    with pytest.raises((RuntimeError, IndexError)):
        folded(weight=inputs.weight, offsets=None, **arguments)
    assert_same_bits(inputs.weight, original)
    assert_product_correct(lambda x, w, b, v, s: folded(x, w, b, v, s.indices, None), inputs)  # and the lock is free


def test_an_error_in_backward_restores_every_bit():
    inputs = make_inputs(SHAPES["k2"])
    original = bits(inputs.weight)
    with pytest.raises(RuntimeError):
        torch.ops.peft_ext.folded_grad_input(
            torch.randn(4, 5, dtype=torch.float64), (4, 9), inputs.weight, inputs.values.detach(),
            inputs.support.indices, None, None, None, [],
        )  # fmt: skip
    assert_same_bits(inputs.weight, original)


@pytest.mark.parametrize("shape", ["k2", "ragged"])
def test_an_interrupt_inside_the_product_restores_every_bit(monkeypatch, shape):
    inputs = make_inputs(SHAPES[shape])
    original = bits(inputs.weight)
    seen = []

    def interrupted(x, weight, bias):
        seen.append(bits(weight))
        raise KeyboardInterrupt

    monkeypatch.setattr(F, "linear", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _folded(inputs)
    assert int((seen[0] != original).sum()) == inputs.values.numel()  # the values were inside when it came
    assert_same_bits(inputs.weight, original)


def test_another_graph_that_saved_the_weight_can_still_go_backward():
    inputs = make_inputs(SHAPES["k2"])
    other = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    z = F.linear(other, inputs.weight)
    y = _folded(inputs)
    y.backward(inputs.grad)
    grad = torch.randn(4, 6, dtype=torch.float64)
    z.backward(grad)
    torch.testing.assert_close(other.grad, grad @ inputs.weight)


def test_a_changed_weight_is_noticed_in_backward():
    inputs = make_inputs(SHAPES["k2"])
    y = _folded(inputs)
    inputs.weight.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y.backward(inputs.grad)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("entries", [3, (1, 0, 7, 2, 2, 3, 5)], ids=str)
def test_two_layers_may_share_one_weight(transposed, entries):
    """Tied weights: each product sees its own values only, in forward and in backward, whatever their order."""
    first, second = make_inputs(Shape((5,), 7, 7, 2), seed=1), make_inputs(Shape((5,), 7, 7, entries), seed=2)
    second.weight = first.weight.t() if transposed else first.weight
    original = bits(first.weight)

    outputs = [_folded(first), _folded(second)]
    for inputs, y in zip((first, second), outputs, strict=True):
        assert_all_close(results_of(y, inputs), reference_results(inputs), TOLERANCES[torch.float64])
    assert_same_bits(first.weight, original)


@pytest.mark.parametrize("what", ["folds", "copies"])
@pytest.mark.parametrize("shape", ["k2", "ragged"])
def test_a_second_thread_waits_until_the_weight_is_whole(shape, what):
    inputs = make_inputs(SHAPES[shape])
    weight, values = inputs.weight, inputs.values.detach()
    indices, offsets = inputs.support.indices, inputs.support.offsets
    original = bits(weight)
    entered = threading.Event()
    seen = []

    def fold_too():
        with folded_in(weight, values, indices, offsets) as target:
            seen.append(bits(target))
            entered.set()

    def copy():
        seen.append(bits(copy_of(weight)))
        entered.set()

    thread = threading.Thread(target={"folds": fold_too, "copies": copy}[what], daemon=True)
    with folded_in(weight, values, indices, offsets) as target:
        with_values = bits(target)
        thread.start()
        assert not entered.wait(0.2)
    thread.join(10)
    assert entered.is_set()
    assert torch.equal(seen[0], with_values if what == "folds" else original)  # the values were added once, not twice
    assert_same_bits(weight, original)
