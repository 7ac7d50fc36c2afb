"""Fused experts run the Triton kernels on slices, expert by expert: output and gradients as of dense matrices."""

import pytest
import torch

from ..test_experts import UNEVEN, make_case


@pytest.mark.parametrize("entries", [1, 3, UNEVEN], ids=["k1", "k3", "uneven"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_and_gradients(kernel, on_interpreter, entries, dtype):
    """`behind` is a token of no expert, and the second expert has none."""
    (result, x, values), ours, dense = make_case(entries, "some without tokens", torch.float32, behind=1)
    leaves = [result.detach().to(dtype).requires_grad_(), x.detach().to(dtype).requires_grad_(), values]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y, expected = ours(*leaves), dense(*wide)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    own = torch.autograd.grad(y, leaves, gradient)
    exact = torch.autograd.grad(expected, wide, gradient.double())
    assert len(on_interpreter) >= 2 * 3  # two experts have tokens; output, x and values
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for mine, theirs in zip([y, *own], [expected, *exact], strict=True):
        assert (mine.double() - theirs).abs().max() <= tolerance * theirs.abs().max()
