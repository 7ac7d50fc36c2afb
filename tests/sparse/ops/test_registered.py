"""Each custom op behaves under torch.library's own checks: schema, fake kernel, autograd, dynamic shapes."""

from functools import partial

import pytest
import torch

from peft_ext.sparse.ops import ConvGeometry
from peft_ext.sparse.ops.conv import entries_by_tap
from tests._models.layers import CONVS

from .._inputs import SHAPES, make_inputs, random_support


OF_BOTH = ("folded_product", "folded_grad_input", "dense_product", "dense_grad_input", "dense_grad_values")
OPS = ("bypass_linear", "sparse_grad_input", "sparse_grad_values", *OF_BOTH)
CONV_OPS = ("bypass_conv", "conv_grad_input", "conv_grad_values", *OF_BOTH)
EXPERT_OPS = ("bypass_linear", "sparse_grad_values", "sparse_grad_input")  # with `ends`


def _arguments(op, shape, dtypes, layout):
    inputs = make_inputs(SHAPES[shape], *dtypes, layout)
    x, grad = (tensor.detach().flatten(0, -2) for tensor in (inputs.x, inputs.grad))
    tables = (inputs.support.indices, inputs.support.offsets, *inputs.support.transposed())
    if op in OF_BOTH:
        return _of_both(op, x, inputs.weight, inputs.bias, inputs.values.detach(), grad, (*tables[:2], None, None, []))
    return _of_update(op, grad, x, inputs.values.detach(), grad, (*tables, None))


def _of_update(op, result, x, values, grad, tables):
    return {
        "product": (*(tensor.clone().requires_grad_() for tensor in (result, x, values)), *tables),
        "grad_values": (grad, x, *tables),
        "grad_input": (grad, list(x.shape[1:]), x.dtype, values, *tables),
    }[next((end for end in ("grad_values", "grad_input") if op.endswith(end)), "product")]


def _of_both(op, x, weight, bias, values, grad, tables):
    """Of the paths that compose the weight."""
    if op.endswith("product"):
        return x.clone().requires_grad_(), weight, bias, values.clone().requires_grad_(), *tables
    return (grad, x, *tables) if op.endswith("values") else (grad, list(x.shape), weight, values, *tables)


def _expert_arguments(op, dtype, entries):
    """Three experts, the second without tokens, and a token of none."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(7, size, generator=generator).to(dtype) for size in (8, 6))
    support = random_support(18, 8, entries, generator)
    values = torch.randn(support.indices.shape, generator=generator)
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    return _of_update(op, grad, x, values, grad, (support.indices, support.offsets, *support.transposed(3), ends))


def _conv_arguments(op, case, dtype, entries):
    layer, x = CONVS[case].build(dtype), CONVS[case].draw(dtype).detach()
    rows, fan_in = layer.weight.shape[0], layer.weight[0].numel()
    support = random_support(rows, fan_in, entries, torch.Generator().manual_seed(0))
    values = torch.randn(support.indices.shape)
    geometry = ConvGeometry.of(layer)
    taps = entries_by_tap(support.indices, geometry.taps)
    tables = (support.indices, support.offsets, *taps, geometry.pack())
    y = layer(x).detach()
    grad = torch.randn_like(y)
    if op in OF_BOTH:
        return _of_both(op, x, layer.weight, layer.bias, values, grad, tables)
    return _of_update(op, y, x, values, grad, tables)


CASES = [
    *(
        (op, partial(_arguments, op, shape, dtypes, layout))
        for op in OPS
        for shape, dtypes, layout in (
            ("k1", (torch.float32, torch.float32), "linear"),
            ("k2", (torch.bfloat16, torch.float32), "conv1d"),
            ("ragged", (torch.float32, torch.float32), "no bias"),
            ("k2 no tokens", (torch.bfloat16, torch.float32), "linear"),
            ("ragged empty", (torch.float64, torch.float64), "linear"),
        )
    ),
    *(
        (op, partial(_conv_arguments, op, case, dtype, entries))
        for op in CONV_OPS
        for case, dtype, entries in (
            ("2d stride", torch.float32, 2),
            ("1d same, even kernel", torch.float32, (0, 2, 1, 0, 4, 1)),
            ("2d depthwise", torch.bfloat16, 1),
            ("3d", torch.float64, 0),
        )
    ),
    *(
        (op, partial(_expert_arguments, op, dtype, entries))
        for op in EXPERT_OPS
        for dtype, entries in ((torch.float32, 1), (torch.bfloat16, 2), (torch.float64, (0, 2, 1, 0, 4, 1) * 3))
    ),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("op", "arguments"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_op_passes_torch_library_opcheck(op, arguments):
    """Also that its fake kernel foretells shapes, dtypes and strides, and that no argument is written to."""
    torch.library.opcheck(getattr(torch.ops.peft_ext, op).default, arguments())


def test_every_registered_op_is_checked():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("peft_ext::")}
    assert registered == {f"peft_ext::{op}" for op, _ in CASES}
