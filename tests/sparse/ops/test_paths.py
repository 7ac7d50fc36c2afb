"""Every path agrees with dense matrices: output and each gradient."""

import pytest
import torch

from .._asserts import (
    TOLERANCES,
    assert_all_close,
    assert_product_correct,
    dense_product,
    output_and_gradients,
    reference_results,
)
from .._inputs import DTYPES, SHAPES, make_inputs
from ._paths import PATHS, PATHS_AND_SHAPES


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize(("dtype", "values_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize(("path", "shape"), PATHS_AND_SHAPES)
def test_output_and_gradients_are_those_of_dense_matrices(path, shape, dtype, values_dtype, layout):
    assert_product_correct(PATHS[path], make_inputs(SHAPES[shape], dtype, values_dtype, layout))


@pytest.mark.parametrize(("path", "shape"), PATHS_AND_SHAPES)
def test_a_layer_without_bias(path, shape):
    assert_product_correct(PATHS[path], make_inputs(SHAPES[shape], layout="no bias"))


def _paths_with(*shapes):
    return [(path, shape) for path, shape in PATHS_AND_SHAPES if shape in shapes]


@pytest.mark.parametrize("kind", ["transposed", "every second", "repeated"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("path", "shape"), _paths_with("k1", "k2", "k2 eight tokens", "k2 one token", "ragged"))
def test_strides_of_x_and_gradient_do_not_matter(path, shape, dtype, kind):
    inputs = make_inputs(SHAPES[shape], dtype)
    inputs.x = _restrided(inputs.x.detach(), kind).requires_grad_()
    inputs.grad = _restrided(inputs.grad, kind)
    assert_product_correct(PATHS[path], inputs)


def _restrided(matrix, kind):
    if kind == "transposed":
        return matrix.t().contiguous().t()
    if kind == "every second":
        wide = torch.full((2 * matrix.shape[0], 2 * matrix.shape[1]), torch.nan, dtype=matrix.dtype)
        wide[::2, ::2] = matrix
        return wide[::2, ::2]
    return matrix[:1].expand(matrix.shape)  # stride 0, as the gradient of a sum has


@pytest.mark.parametrize("wanted", [("x",), ("values",), ("bias",), ("x", "bias"), ("values", "bias")], ids="+".join)
@pytest.mark.parametrize(("path", "shape"), _paths_with("k1", "k2", "ragged"))
def test_gradients_are_right_when_only_some_are_wanted(path, shape, wanted):
    inputs = make_inputs(SHAPES[shape])
    for name in ("x", "values", "bias"):
        getattr(inputs, name).requires_grad_(name in wanted)
    results = output_and_gradients(PATHS[path], inputs)
    assert set(results) == {"output"} | {f"gradient of {name}" for name in wanted}
    assert_all_close(results, reference_results(inputs), TOLERANCES[torch.float64])


@pytest.mark.parametrize(
    ("path", "shape"),
    _paths_with("k1", "k2", "k2 vector", "k2 nine tokens", "k1 3-D", "k=fan_in", "ragged"),
)
def test_gradients_are_derivatives(path, shape):
    inputs = make_inputs(SHAPES[shape])

    def product(x, bias, values):
        return PATHS[path](x, inputs.weight, bias, values, inputs.support)

    assert torch.autograd.gradcheck(product, (inputs.x, inputs.bias, inputs.values))


@pytest.mark.parametrize(("path", "shape"), _paths_with("k1", "k2", "k2 nine tokens", "k2 3-D", "ragged"))
def test_second_derivatives_are_derivatives_of_the_first(path, shape):
    inputs = make_inputs(SHAPES[shape])

    def product(x, bias, values):
        return PATHS[path](x, inputs.weight, bias, values, inputs.support)

    assert torch.autograd.gradgradcheck(product, (inputs.x, inputs.bias, inputs.values))


@pytest.mark.parametrize(("path", "shape"), _paths_with("k1", "k2", "ragged"))
def test_third_derivatives_are_those_of_dense_matrices(path, shape):
    """Through all three products, which are made of one another."""
    results = []
    for compute in (PATHS[path], dense_product):
        inputs = make_inputs(SHAPES[shape])
        derivative = compute(inputs.x, inputs.weight, inputs.bias, inputs.values, inputs.support).tanh()
        for _ in range(3):
            leaves = (inputs.x, inputs.values)
            derivative = sum(
                g.square().sum() for g in torch.autograd.grad(derivative.sum(), leaves, create_graph=True)
            )
        results.append({"penalty": derivative.detach()})
    assert_all_close(*results, TOLERANCES[torch.float64])


@pytest.mark.parametrize(("dtype", "values_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_a_gradient_penalty_in_other_dtypes(path, dtype, values_dtype):
    results = []
    for compute, kind, values_kind in (
        (PATHS[path], dtype, values_dtype),
        (dense_product, torch.float64, torch.float64),
    ):
        inputs = make_inputs(SHAPES["k2"], dtype, values_dtype)
        for name in ("x", "weight", "bias", "grad"):
            setattr(inputs, name, getattr(inputs, name).detach().to(kind))
        leaves = [inputs.x.requires_grad_(), inputs.values.detach().to(values_kind).requires_grad_()]
        y = compute(inputs.x, inputs.weight, inputs.bias, leaves[1], inputs.support)
        (gradient,) = torch.autograd.grad(y, inputs.x, inputs.grad, create_graph=True)
        penalty = gradient.double().square().sum()
        results.append({"penalty": penalty.detach(), "its gradient": torch.autograd.grad(penalty, leaves[1])[0]})
        assert results[-1]["its gradient"].dtype == values_kind
    assert_all_close(*results, 4 * TOLERANCES[dtype])


@pytest.mark.parametrize("path", PATHS)
def test_repeated_tokens_add_up(path):
    """A batch of one sample twice gives twice the gradients of the sample, which no single token's test shows."""
    once = make_inputs(SHAPES["k2"])
    twice = make_inputs(SHAPES["k2"])
    twice.x = torch.cat([once.x, once.x]).detach().requires_grad_()
    twice.grad = torch.cat([once.grad, once.grad])
    one, two = (output_and_gradients(PATHS[path], inputs) for inputs in (once, twice))
    torch.testing.assert_close(two["gradient of values"], 2 * one["gradient of values"])
    torch.testing.assert_close(two["gradient of bias"], 2 * one["gradient of bias"])
