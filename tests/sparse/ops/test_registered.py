"""Each custom op behaves under torch.library's own checks: schema, fake kernel, autograd, dynamic shapes."""

import pytest
import torch

from .._inputs import SHAPES, make_inputs


TABLE_OPS = ("folded_linear", "folded_grad_input")
OPS = (
    *TABLE_OPS,
    "sparse_add",
    "sparse_grad_values",
    "sparse_grad_input",
    "bypass_linear",
    "dense_linear",
    "dense_grad_input",
    "dense_grad_values",
)


def _arguments(op, inputs):
    x, values, weight = inputs.x.flatten(0, -2), inputs.values, inputs.weight
    x = x.detach().requires_grad_()
    grad = inputs.grad.flatten(0, -2)
    support = inputs.support
    entries, column_offsets = support.transposed()
    frozen = values.detach()
    return {
        "sparse_add": (grad, x.detach(), frozen, support.indices, support.offsets),
        "sparse_grad_values": (grad, x.detach(), support.indices, support.offsets),
        "sparse_grad_input": (grad, frozen, support.indices, support.offsets, entries, column_offsets, x.dtype),
        "bypass_linear": (
            grad.clone().requires_grad_(), x, values, support.indices, support.offsets, entries, column_offsets,
        ),
        "folded_linear": (x, weight, inputs.bias, values, support.indices),
        "folded_grad_input": (grad, weight, frozen, support.indices),
        "dense_linear": (x, weight, inputs.bias, values, support.indices, support.offsets),
        "dense_grad_input": (grad, weight, frozen, support.indices, support.offsets),
        "dense_grad_values": (grad, x.detach(), support.indices, support.offsets),
    }[op]  # fmt: skip


CASES = [
    pytest.param(op, shape, dtypes, layout, id=f"{op}-{shape}-{layout}")
    for op in OPS
    for shape, dtypes, layout in (
        ("k1", (torch.float32, torch.float32), "linear"),
        ("k2", (torch.bfloat16, torch.float32), "conv1d"),
        ("ragged", (torch.float32, torch.float32), "no bias"),
    )
    if not (op in TABLE_OPS and shape == "ragged")
]


@pytest.mark.parametrize(("op", "shape", "dtypes", "layout"), CASES)
def test_op_passes_torch_library_opcheck(op, shape, dtypes, layout):
    inputs = make_inputs(SHAPES[shape], *dtypes, layout)
    torch.library.opcheck(getattr(torch.ops.peft_ext, op).default, _arguments(op, inputs))


def test_every_registered_op_is_checked():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("peft_ext::")}
    assert registered == {f"peft_ext::{op}" for op in OPS}


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (op, shape)
        for op in OPS
        for shape in ("k1", "k2", "ragged", "k2 no tokens", "ragged empty")
        if SHAPES[shape].is_table or op not in TABLE_OPS
    ],
)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)], ids=str)
def test_fake_kernel_foretells_shape_and_dtype(op, shape, dtypes):
    arguments = _arguments(op, make_inputs(SHAPES[shape], *dtypes, "linear"))
    real = getattr(torch.ops.peft_ext, op)(*arguments)
    meta = [argument.to("meta") if isinstance(argument, torch.Tensor) else argument for argument in arguments]
    fake = getattr(torch.ops.peft_ext, op)(*meta)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
