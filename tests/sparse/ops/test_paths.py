"""Every path agrees with dense matrices: output and each gradient."""

import pytest
import torch

from .._asserts import TOLERANCES, assert_all_close, assert_product_correct, output_and_gradients, reference_results
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


@pytest.mark.parametrize("path", ["bypass", "folded", "dense"])
def test_second_derivatives_are_refused_not_wrong(path):
    inputs = make_inputs(SHAPES["k2"])
    y = PATHS[path](inputs.x, inputs.weight, inputs.bias, inputs.values, inputs.support)
    (gradient,) = torch.autograd.grad(y.square().sum(), inputs.values, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(gradient.sum(), inputs.x)


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
