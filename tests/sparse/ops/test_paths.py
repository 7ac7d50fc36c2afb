"""Every path agrees with dense matrices: output and each gradient."""

import pytest
import torch

from .._asserts import (
    TOLERANCES,
    assert_all_close,
    assert_product_correct,
    assert_same_bits,
    bits,
    dense_product,
    output_and_gradients,
    reference_results,
)
from .._inputs import DTYPES, SHAPES, make_inputs
from ._paths import PATHS, PATHS_AND_SHAPES
from .gpu._cases import LAYOUTS, laid_out


EVERY_LAYOUT = pytest.mark.parametrize("layout", ["linear", "conv1d", "no bias"])


def _paths_with(*shapes):
    return [(path, shape) for path, shape in PATHS_AND_SHAPES if shape in shapes]


@EVERY_LAYOUT
@pytest.mark.parametrize(("path", "shape"), PATHS_AND_SHAPES)
def test_output_and_gradients_are_those_of_dense_matrices(path, shape, layout):
    assert_product_correct(PATHS[path], make_inputs(SHAPES[shape], layout=layout))


@EVERY_LAYOUT
@pytest.mark.parametrize(("dtype", "values_dtype"), DTYPES[1:], ids=str)
@pytest.mark.parametrize(("path", "shape"), _paths_with("k1", "k2 3-D", "k20", "k2 no tokens", "k2 vector", "ragged"))
def test_in_other_dtypes_too(path, shape, dtype, values_dtype, layout):
    assert_product_correct(PATHS[path], make_inputs(SHAPES[shape], dtype, values_dtype, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("path", "shape"), _paths_with("k1", "k2", "k2 eight tokens", "k2 one token", "ragged"))
def test_strides_of_x_and_gradient_do_not_matter(path, shape, dtype, layout):
    inputs = make_inputs(SHAPES[shape], dtype)
    inputs.x = laid_out(inputs.x.detach(), layout).requires_grad_()
    inputs.grad = laid_out(inputs.grad, layout)
    assert_product_correct(PATHS[path], inputs)


@pytest.mark.parametrize("wanted", [("x",), ("values",), ("bias",), ("x", "bias"), ("values", "bias")], ids="+".join)
@pytest.mark.parametrize(("path", "shape"), _paths_with("k1", "k2", "ragged"))
def test_gradients_are_right_when_only_some_are_wanted(path, shape, wanted):
    inputs = make_inputs(SHAPES[shape])
    for name in ("x", "values", "bias"):
        getattr(inputs, name).requires_grad_(name in wanted)
    original = bits(inputs.weight)
    results = output_and_gradients(PATHS[path], inputs)
    assert_same_bits(inputs.weight, original)
    assert set(results) == {"output"} | {f"gradient of {name}" for name in wanted}
    assert_all_close(results, reference_results(inputs), TOLERANCES[torch.float64])


@pytest.mark.parametrize(("path", "shape"), _paths_with("k1", "k2", "k2 nine tokens", "k2 3-D", "ragged"))
def test_second_and_third_derivatives_are_those_of_dense_matrices(path, shape):
    """Through all three products, which are made of one another."""
    results = []
    for compute in (PATHS[path], dense_product):
        inputs = make_inputs(SHAPES[shape])
        derivative = compute(inputs.x, inputs.weight, inputs.bias, inputs.values, inputs.support).tanh()
        found = {}
        for order in (1, 2, 3):
            leaves = (inputs.x, inputs.values, inputs.bias)
            gradients = torch.autograd.grad(derivative.sum(), leaves, create_graph=True)
            found |= {f"{order}, {number}": gradient.detach() for number, gradient in enumerate(gradients)}
            derivative = sum(gradient.square().sum() for gradient in gradients)
        results.append(found)
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
