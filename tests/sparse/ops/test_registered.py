"""Each custom op behaves under torch.library's own checks: schema, fake kernel, autograd, dynamic shapes."""

from functools import partial

import pytest
import torch

from peft_ext.sparse.ops import ConvGeometry
from peft_ext.sparse.ops.conv import entries_by_tap
from tests._models.layers import CONVS

from .._inputs import SHAPES, make_inputs, random_support


OPS = (
    "folded_linear",
    "folded_grad_input",
    "sparse_grad_values",
    "sparse_grad_input",
    "bypass_linear",
    "dense_linear",
    "dense_grad_input",
    "dense_grad_values",
)
CONV_OPS = (
    "bypass_conv",
    "conv_grad_input",
    "conv_grad_values",
    "dense_conv_grad_values",
    "folded_conv",
    "folded_conv_grad_input",
)
EXPERT_OPS = ("bypass_linear", "sparse_grad_values", "sparse_grad_input")  # with `ends`


def _arguments(op, shape, dtypes, layout):
    inputs = make_inputs(SHAPES[shape], *dtypes, layout)
    x, values, weight = inputs.x.flatten(0, -2), inputs.values, inputs.weight
    x = x.detach().requires_grad_()
    grad = inputs.grad.flatten(0, -2)
    support = inputs.support
    entries, column_offsets = support.transposed()
    frozen = values.detach()
    return {
        "sparse_grad_values": (grad, x.detach(), support.indices, support.offsets),
        "sparse_grad_input": (grad, frozen, support.indices, support.offsets, entries, column_offsets, x.dtype),
        "bypass_linear": (
            grad.clone().requires_grad_(), x, values, support.indices, support.offsets, entries, column_offsets,
        ),
        "folded_linear": (x, weight, inputs.bias, values, support.indices, support.offsets),
        "folded_grad_input": (grad, weight, frozen, support.indices, support.offsets),
        "dense_linear": (x, weight, inputs.bias, values, support.indices, support.offsets),
        "dense_grad_input": (grad, weight, frozen, support.indices, support.offsets),
        "dense_grad_values": (grad, x.detach(), support.indices, support.offsets),
    }[op]  # fmt: skip


def _expert_arguments(op, dtype, entries):
    """Three experts, the second without tokens, and a token of none."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(7, size, generator=generator).to(dtype) for size in (8, 6))
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    support = random_support(18, 8, entries, generator)
    values = torch.randn(support.indices.shape, generator=generator)
    rows, tables = (support.indices, support.offsets), support.transposed(3)
    return {
        "bypass_linear": (
            grad.clone().requires_grad_(), x.clone().requires_grad_(), values.clone().requires_grad_(), *rows, *tables,
            ends,
        ),
        "sparse_grad_values": (grad, x, *rows, ends),
        "sparse_grad_input": (grad, values, *rows, *tables, dtype, ends),
    }[op]  # fmt: skip


def _conv_arguments(op, case, dtype, entries):
    layer, x = CONVS[case].build(dtype), CONVS[case].draw(dtype)
    weight, bias = layer.weight, layer.bias
    rows, fan_in = weight.shape[0], weight[0].numel()
    support = random_support(rows, fan_in, entries, torch.Generator().manual_seed(0))
    values = torch.randn(support.indices.shape)
    geometry = ConvGeometry.of(layer)
    tables = (support.indices, support.offsets, *entries_by_tap(support.indices, geometry.taps))
    y, packed, size = layer(x.detach()), geometry.pack(), list(x.shape)
    grad, trained = torch.randn_like(y), values.clone().requires_grad_()
    return {
        "bypass_conv": (y.requires_grad_(), x, trained, *tables, packed),
        "conv_grad_input": (grad, size, x.dtype, values, *tables, packed),
        "conv_grad_values": (grad, x.detach(), *tables, packed),
        "dense_conv_grad_values": (grad, x.detach(), weight, *tables[:2], packed),
        "folded_conv": (x, weight, bias, trained, *tables, packed, False),
        "folded_conv_grad_input": (grad, size, weight, values, *tables[:2], packed),
    }[op]


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
