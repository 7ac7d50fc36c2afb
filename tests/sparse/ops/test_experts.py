"""The bypass of experts against dense products, expert by expert: output, gradients and theirs."""

import pytest
import torch

from peft_ext.sparse.ops import bypass

from .._asserts import dense_update
from .._inputs import random_support


EXPERTS, ROWS, FAN_IN = 4, 6, 8
UNEVEN = (0, 2, 1, 0, 4, 1) * EXPERTS
LOADS = {
    "some without tokens": (3, 0, 5, 0),
    "one each": (1, 1, 1, 1),
    "all on the last": (0, 0, 0, 300),
    "all on the first": (9, 0, 0, 0),
    "uneven": (21, 1, 0, 40),
    "no tokens": (0, 0, 0, 0),
}


def _dense(result, x, values, support, loads):
    updates = dense_update(values, support).view(EXPERTS, ROWS, FAN_IN)
    expert = torch.tensor([number for number, load in enumerate(loads) for _ in range(load)], device=x.device).long()
    own = torch.einsum("trf,tf->tr", updates[expert], x[: len(expert)])
    return result + torch.cat([own, own.new_zeros(len(x) - len(expert), ROWS)])


def make_case(entries, load, dtype=torch.float64, behind=2, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    support = random_support(EXPERTS * ROWS, FAN_IN, entries, generator)
    loads = LOADS[load]
    tokens = sum(loads) + behind
    leaves = [
        torch.randn(shape, generator=generator, dtype=dtype).to(device).requires_grad_()
        for shape in ((tokens, ROWS), (tokens, FAN_IN), support.indices.shape)
    ]
    ends = torch.tensor(loads, device=device).cumsum(0).to(torch.int32)
    support = support.to(device)
    tables = (support.indices, support.offsets, *support.transposed(EXPERTS), ends)
    return leaves, lambda r, x, v: bypass(r, x, v, *tables), lambda r, x, v: _dense(r, x, v, support, loads)


@pytest.mark.parametrize("entries", [1, 3, UNEVEN], ids=["k1", "k3", "uneven"])
@pytest.mark.parametrize("load", LOADS)
def test_output_and_every_gradient(load, entries):
    leaves, ours, dense = make_case(entries, load)
    result, expected = ours(*leaves), dense(*leaves)
    torch.testing.assert_close(result, expected)
    gradient = torch.randn_like(expected)
    for own, reference in zip(
        torch.autograd.grad(result, leaves, gradient), torch.autograd.grad(expected, leaves, gradient), strict=True
    ):
        torch.testing.assert_close(own, reference)


@pytest.mark.parametrize("entries", [1, UNEVEN], ids=["k1", "uneven"])
def test_derivatives_have_derivatives(entries):
    leaves, ours, _ = make_case(entries, "some without tokens")
    assert torch.autograd.gradgradcheck(ours, leaves)


def test_bf16_rounds_once():
    (result, x, values), ours, dense = make_case(2, "some without tokens", torch.float32)
    rough = [result.bfloat16(), x.bfloat16()]
    exact = dense(*(tensor.float() for tensor in rough), values)
    assert torch.equal(ours(*rough, values), exact.bfloat16())
