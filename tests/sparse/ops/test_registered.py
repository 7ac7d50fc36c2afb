"""Each custom op behaves under torch.library's own checks: schema, fake kernel, autograd, dynamic shapes."""

from functools import partial

import pytest
import torch

from peft_ext.sparse.ops import ConvGeometry
from peft_ext.sparse.ops.conv import entries_by_tap
from tests._models.layers import CONVS

from .._inputs import SHAPES, make_inputs, random_support


OF_UPDATES = ("bypass_product", "sparse_grad_input", "sparse_grad_values")
OPS = (*OF_UPDATES, "folded_product", "folded_grad_input", "dense_product", "dense_grad_input", "dense_grad_values")


def _arguments(op, shape, dtypes, layout):
    inputs = make_inputs(SHAPES[shape], *dtypes, layout)
    x, grad = (tensor.detach().flatten(0, -2) for tensor in (inputs.x, inputs.grad))
    support = (inputs.support.indices, inputs.support.offsets)
    tables = inputs.support.transposed() if op in OF_UPDATES else (None, None)
    return _of(op, x, inputs.weight, inputs.bias, inputs.values.detach(), grad, (*support, *tables), [])


def _of(op, x, weight, bias, values, grad, tables, geometry, ends=None):
    trained, size = values.clone().requires_grad_(), list(x.shape)
    return {
        "bypass_product": (grad.clone().requires_grad_(), x.clone().requires_grad_(), trained, *tables, ends),
        "sparse_grad_values": (grad, x, *tables, ends),
        "sparse_grad_input": (grad, size[1:], x.dtype, values, *tables, ends),
        "product": (x.clone().requires_grad_(), weight, bias, trained, *tables),
        "grad_input": (grad, size, weight, values, *tables),
        "grad_values": (grad, x, *tables),
    }[op if op in OF_UPDATES else op.partition("_")[2]] + (geometry,)


def _expert_arguments(op, dtype, entries):
    """Three experts, the second without tokens, and a token of none."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(7, size, generator=generator).to(dtype) for size in (8, 6))
    support = random_support(18, 8, entries, generator)
    values = torch.randn(support.indices.shape, generator=generator)
    tables = (support.indices, support.offsets, *support.transposed(3))
    return _of(op, x, None, None, values, grad, tables, [], torch.tensor([2, 2, 6], dtype=torch.int32))


def _conv_arguments(op, case, dtype, entries):
    layer, x = CONVS[case].build(dtype), CONVS[case].draw(dtype).detach()
    rows, fan_in = layer.weight.shape[0], layer.weight[0].numel()
    support = random_support(rows, fan_in, entries, torch.Generator().manual_seed(0))
    geometry, values = ConvGeometry.of(layer), torch.randn(support.indices.shape)
    tables = (support.indices, support.offsets, *entries_by_tap(support.indices, geometry.taps))
    grad = torch.randn_like(layer(x))
    return _of(op, x, layer.weight, layer.bias, values, grad, tables, geometry.pack())


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
        for op in OPS
        for case, dtype, entries in (
            ("2d stride", torch.float32, 2),
            ("1d same, even kernel", torch.float32, (0, 2, 1, 0, 4, 1)),
            ("2d depthwise", torch.bfloat16, 1),
            ("3d", torch.float64, 0),
        )
    ),
    *(
        (op, partial(_expert_arguments, op, dtype, entries))
        for op in OF_UPDATES
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
