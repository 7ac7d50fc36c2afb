"""What tests assert: agreement with a dense reference of our own, and equality of bits."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from peft_ext.sparse.support import Support

from ._inputs import Inputs


# Largest error relative to the largest reference value. 16-bit types: some roundings of 2^-9 (bf16) and 2^-12 (fp16).
TOLERANCES = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}  # by bytes per element

Product = Callable[[Tensor, Tensor, Tensor | None, Tensor, Support], Tensor]


def positions(support: Support) -> list[tuple[int, int]]:
    """Row and column of each entry, read from the tensors one by one."""
    if support.offsets is None:
        return [(row, column) for row, columns in enumerate(support.indices.tolist()) for column in columns]
    columns, ends = support.indices.tolist(), support.offsets.tolist()
    return [(row, column) for row in range(len(ends) - 1) for column in columns[ends[row] : ends[row + 1]]]


def dense_update(values: Tensor, support: Support) -> Tensor:
    """The sparse update as a dense matrix, made entry by entry; differentiable in `values`."""
    rows, columns = torch.tensor(positions(support), dtype=torch.int64).view(-1, 2).unbind(1)
    matrix = torch.zeros(support.rows, support.fan_in, dtype=values.dtype)
    matrix[rows, columns] = values.reshape(-1)
    return matrix


def dense_product(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, support: Support) -> Tensor:
    """`(W + S) x + b` by dense matrices."""
    out = x @ (weight + dense_update(values, support)).t()
    return out if bias is None else out + bias


def results_of(y: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    """`y` and the gradient of each differentiable input, by name; `y` was computed from `inputs`."""
    leaves = {"x": inputs.x, "values": inputs.values, "bias": inputs.bias}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.grad)
    named = {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"output": y.detach(), **named}


def output_and_gradients(product: Product, inputs: Inputs) -> dict[str, Tensor]:
    return results_of(product(inputs.x, inputs.weight, inputs.bias, inputs.values, inputs.support), inputs)


def reference_results(inputs: Inputs) -> dict[str, Tensor]:
    """Output and gradients by dense matrices in fp64, from the numbers that `inputs` hold."""

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)

    return output_and_gradients(
        dense_product,
        Inputs(
            wide(inputs.x),
            wide(inputs.weight),
            wide(inputs.bias),
            wide(inputs.values),
            inputs.support,
            inputs.grad.double(),
        ),
    )


def assert_all_close(results: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """Each result by name: shape, and its largest error relative to the largest expected value."""
    assert list(results) == list(expected)
    for name, result in results.items():
        assert result.shape == expected[name].shape, name
        if result.numel() == 0:
            continue
        error = (result.double() - expected[name]).abs().max()
        # Not `error > bound`: a NaN must not pass.
        assert error <= tolerance * expected[name].abs().max(), f"{name}: off by {float(error)}"


def assert_product_correct(product: Product, inputs: Inputs) -> None:
    """Output and every gradient of `product` agree with dense matrices, and have the dtypes of what they belong to."""
    results = output_and_gradients(product, inputs)
    assert results["output"].dtype == inputs.weight.dtype
    assert_all_close(results, reference_results(inputs), TOLERANCES[inputs.weight.dtype])


def bits(tensor: Tensor) -> Tensor:
    """A copy of the bits of a tensor, which compare equal also for NaN and tell 0.0 from -0.0."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(_BITS[tensor.element_size()])


def assert_same_bits(tensor: Tensor, expected_bits: Tensor) -> None:
    """`expected_bits` come from [`bits`]."""
    now = bits(tensor)
    assert now.shape == expected_bits.shape and now.dtype == expected_bits.dtype
    changed = int((now != expected_bits).sum())
    assert changed == 0, f"{changed} of {now.numel()} elements have other bits"


def assert_same_support(support: Support, expected: Support) -> None:
    assert support.fan_in == expected.fan_in
    assert torch.equal(support.indices, expected.indices)
    assert support.is_table == expected.is_table
    if support.offsets is not None:
        assert torch.equal(support.offsets, expected.offsets)


def ulps_apart(result: Tensor, exact: Tensor) -> Tensor:
    """Distance of `result` from the fp64 `exact`, in units of the last place of the dtype of `result`."""
    _, exponent = torch.frexp(exact)
    spacing = torch.ldexp(torch.full_like(exact, torch.finfo(result.dtype).eps), exponent - 1)
    return (result.double() - exact).abs() / spacing
