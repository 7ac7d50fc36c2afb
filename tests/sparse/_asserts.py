"""What tests assert: agreement with a dense reference of our own, and equality of bits."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_ext.sparse.bases.part import Part
from peft_ext.sparse.layers import SparseLayer
from peft_ext.sparse.support import Support
from tests._models.layers import as_weight, with_weight

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


def dense_output(layer: Any, x: Tensor, adapters: Sequence[str]) -> Tensor:
    """What a layer's base computes with some adapters in its weight, in fp64."""
    base = copy.deepcopy(layer.get_base_layer()).double()
    leaves = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
    return _with_adapters(layer, base, x.double(), leaves, adapters)


def _with_adapters(layer: Any, base: Any, x: Tensor, leaves: Mapping[str, Tensor], adapters: Sequence[str]) -> Tensor:
    weight, bias = leaves["base_layer.weight"], leaves.get("base_layer.bias")
    for name in adapters:
        prefix = f"{layer.adapter_layer_names[0]}.{name}"
        weight = weight + as_weight(base, dense_update(leaves[f"{prefix}.weight"], layer.deltas[name].support))
        if f"{prefix}.bias" in leaves:
            bias = bias + leaves[f"{prefix}.bias"]
    return with_weight(base, x, weight, bias)


def layer_and_dense_results(
    layer: Any, x: Tensor, then: Callable[[Tensor, Tensor], Tensor] = lambda y, x: y
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """
    The output, and the gradients of x and of each trained parameter by name: of a layer with its active adapters, and
    of its base layer with these adapters in dense weights in fp64. `then` goes on to compute with the output and x.
    """
    base = copy.deepcopy(layer.get_base_layer()).double()
    own = {"x": x} | dict(layer.named_parameters())
    wide = {name: leaf.detach().double().requires_grad_(leaf.requires_grad) for name, leaf in own.items()}
    outputs = then(layer(x), x), then(_with_adapters(layer, base, wide["x"], wide, layer.active_adapters), wide["x"])
    grad = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(4)).to(outputs[0].dtype)
    results = []
    for y, leaves in zip(outputs, (own, wide), strict=True):
        trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        gradients = torch.autograd.grad(y, list(trained.values()), grad.to(y.dtype))
        results.append({"output": y.detach(), **dict(zip(trained, gradients, strict=True))})
    return results[0], results[1]


def assert_layer_correct(layer: Any, x: Tensor, **options: Any) -> None:
    """Output and every gradient of an adapted layer agree with dense weights, in the dtype of the base."""
    results, expected = layer_and_dense_results(layer, x, **options)
    assert results["output"].dtype == layer.get_base_layer().weight.dtype
    assert_all_close(results, expected, TOLERANCES[results["output"].dtype])


def with_dense_updates(model: Any, network: nn.Module) -> Any:
    """A copy of the base network of an adapted model with the adapter in its weights and biases."""
    dense = copy.deepcopy(network)
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, SparseLayer):
            base, bias = layer.get_base_layer(), layer.deltas["default"].bias
            is_part = isinstance(base, Part)
            own: Any = dense.get_submodule(name.rpartition(".")[0] if is_part else name)
            own = type(base)(own, base.name) if is_part else own
            own.weight.data += layer.get_delta_weight("default")
            if bias is not None:
                own.bias.data += bias.detach()
    return dense


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
    """Output and every gradient of `product` agree with dense matrices and have the dtypes of what they belong to, and
    what it was given keeps every bit."""
    given = [tensor for tensor in vars(inputs).values() if isinstance(tensor, Tensor)]
    before = [bits(tensor) for tensor in given]
    results = output_and_gradients(product, inputs)
    for tensor, expected in zip(given, before, strict=True):
        assert_same_bits(tensor, expected)
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


def state_bits(module: nn.Module) -> dict[str, Tensor]:
    """The bits of all that a module's state dict holds."""
    return {name: bits(tensor) for name, tensor in module.state_dict().items()}


def assert_same_state(module: nn.Module, expected: Mapping[str, Tensor]) -> None:
    """`expected` comes from [`state_bits`]."""
    now = module.state_dict()
    assert now.keys() == expected.keys()
    for name, tensor in now.items():
        assert torch.equal(bits(tensor), expected[name]), name


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
