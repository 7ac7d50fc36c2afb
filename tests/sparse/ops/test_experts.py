"""The bypass of experts against dense products, expert by expert: output, gradients and theirs."""

import pytest
import torch

from peft_ext.sparse.ops import bypass

from .._asserts import dense_update
from .._inputs import random_support
from .gpu._cases import laid_out


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


def assert_right(leaves, ours, dense, tolerance=1e-12, layout="contiguous"):
    """Output and every gradient are those of dense products in fp64."""
    given = [*(laid_out(leaf.detach(), layout).requires_grad_() for leaf in leaves[:2]), leaves[2]]
    wide = [leaf.detach().double().requires_grad_() for leaf in given]
    grad = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(1)).to(leaves[0])
    grad = laid_out(grad, layout)
    results = []
    for tensors, compute in ((given, ours), (wide, dense)):
        y = compute(*tensors)
        results.append([y, *torch.autograd.grad(y, tensors, grad.to(y.dtype))])
    for mine, theirs in zip(*results, strict=True):
        assert ((mine.double() - theirs).abs() <= tolerance * theirs.abs().max()).all()  # a NaN does not pass


@pytest.mark.parametrize("entries", [1, 3, UNEVEN], ids=["k1", "k3", "uneven"])
@pytest.mark.parametrize("load", LOADS)
def test_output_and_every_gradient(load, entries):
    assert_right(*make_case(entries, load))


@pytest.mark.parametrize("entries", [1, UNEVEN], ids=["k1", "uneven"])
def test_derivatives_have_derivatives(entries):
    leaves, ours, _ = make_case(entries, "some without tokens")
    assert torch.autograd.gradgradcheck(ours, leaves)


def test_bf16_rounds_once():
    (result, x, values), ours, dense = make_case(2, "some without tokens", torch.float32)
    rough = [result.bfloat16(), x.bfloat16()]
    exact = dense(*(tensor.float() for tensor in rough), values)
    assert torch.equal(ours(*rough, values), exact.bfloat16())
