"""Fused experts on the Triton kernels, in the interpreter: one launch for all of them, right as dense matrices are."""

import pytest
import torch

from peft_ext.sparse.ops.gpu import launch

from ..test_experts import UNEVEN, make_case
from ..test_experts import assert_right as assert_equals_dense


EACH_KERNEL = pytest.mark.parametrize("kernel", ["direct", "columns_first"], indirect=True)
ENTRIES = pytest.mark.parametrize("entries", [1, 3, UNEVEN], ids=["k1", "k3", "uneven"])


def assert_right(leaves, ours, dense, layout="contiguous"):
    """Sums are taken in fp32 and rounded once."""
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[leaves[0].dtype]
    assert_equals_dense(leaves, ours, dense, tolerance, layout)


@EACH_KERNEL
@ENTRIES
@pytest.mark.parametrize("load", ["some without tokens", "all on the first", "no tokens"])
def test_output_and_gradients(kernel, on_interpreter, entries, load):
    """Behind the experts' tokens are two that no expert gets."""
    leaves, ours, dense = make_case(entries, load, torch.float32)
    assert_right(leaves, ours, dense)
    names = ["gather_sum", "gather_sum", "grad_values"]
    if kernel == "columns_first":
        names = ["transposed", "gather_sum", "transposed", "gather_sum", "grad_values"]
    assert on_interpreter == names


@EACH_KERNEL
@pytest.mark.parametrize("entries", [3, UNEVEN], ids=["k3", "uneven"])
@pytest.mark.parametrize("layout", ["transposed", "sliced"])
@pytest.mark.usefixtures("kernel")
def test_in_16_bits_and_other_strides(entries, layout):
    leaves, ours, dense = make_case(entries, "some without tokens", torch.float32)
    narrow = [leaf.detach().to(torch.bfloat16) for leaf in leaves[:2]]
    assert_right([*narrow, leaves[2]], ours, dense, layout)


@EACH_KERNEL
@pytest.mark.usefixtures("kernel")
def test_parts_of_many_tokens(monkeypatch):
    monkeypatch.setattr(launch, "splits_of", lambda tokens, entries: (3, 16))
    leaves, ours, dense = make_case(3, "uneven", torch.float32)
    assert_right(leaves, ours, dense)


@EACH_KERNEL
@ENTRIES
@pytest.mark.usefixtures("kernel")
def test_every_element_is_written(entries):
    """Memory that nothing wrote to reads as NaN here."""
    leaves, ours, dense = make_case(entries, "some without tokens", torch.float32, behind=9)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        assert_right(leaves, ours, dense)
    finally:
        torch.use_deterministic_algorithms(False)


@ENTRIES
@pytest.mark.usefixtures("on_interpreter")
def test_configurations_that_would_run_without_measuring(entries):
    leaves, ours, dense = make_case(entries, "some without tokens", torch.float32)
    assert_right(leaves, ours, dense)


@pytest.mark.parametrize("block", [1, 4, 16, 128])
@pytest.mark.parametrize(
    "load", [(3, 0, 5, 0), (1,) * 7, (0, 0, 129), (4, 8, 16), (5, 1, 1, 1, 127, 0), (0, 0)], ids=str
)
def test_tiles_are_enough_for_any_load(load, block):
    for behind in (0, 1, block + 1):
        needed = sum(-(-tokens // block) for tokens in (*load, behind))
        assert needed <= launch.tiles_of(sum(load) + behind, len(load), block)
