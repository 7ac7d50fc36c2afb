"""The Triton kernels, in the interpreter: output and every gradient equal those of dense matrices."""

import pytest
import torch

from peft_ext.sparse.ops import add_in_place, bypass, may_add_in_place
from peft_ext.sparse.ops.bypass import sparse_add, sparse_grad_input, sparse_grad_values
from peft_ext.sparse.ops.gpu import launch
from peft_ext.sparse.support import Support

from ..._asserts import assert_product_correct, dense_update
from ..._inputs import SHAPES as ALL_SHAPES
from ..._inputs import Shape, make_inputs
from .._paths import PATHS
from ._cases import DTYPES, LAYOUTS, SHAPES, Case, assert_case_correct, assert_rounded_once


FLOAT = (torch.float32,) * 3
BFLOAT = (torch.bfloat16, torch.bfloat16, torch.float32)
STAGED_SUFFIX = {"direct": "", "staged": "_staged"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: " ".join(str(dtype)[6:] for dtype in dtypes))
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_fp32_sums_rounded_once(kernel, on_interpreter, shape, dtypes, layout):
    case = Case.draw(SHAPES[shape], dtypes, layout)
    assert_case_correct(case, bypass(case.result, case.x, case.values, *case.support_tensors()))
    suffix = STAGED_SUFFIX[kernel]
    assert on_interpreter == [f"gather_sum{suffix}", f"gather_sum{suffix}", f"grad_values{suffix}"]


@pytest.mark.parametrize("shape", ["k1", "k above the block", "ragged", "one token"])
@pytest.mark.parametrize("dtypes", [FLOAT, BFLOAT], ids=["float32", "bfloat16"])
def test_in_place_is_the_same(kernel, shape, dtypes):
    case = Case.draw(SHAPES[shape], dtypes, "contiguous")
    base = case.result * 1  # as a layer's output: no leaf
    assert may_add_in_place(base, case.x, case.values)
    out = add_in_place(base, case.x, case.values, *case.support_tensors())
    assert out.data_ptr() == base.data_ptr()
    assert_case_correct(case, out)


@pytest.mark.parametrize("shape", [name for name, shape in ALL_SHAPES.items() if 0 in (*shape.tokens, shape.entries)])
@pytest.mark.usefixtures("on_interpreter")
def test_nothing_to_do(shape):
    assert_product_correct(PATHS["bypass"], make_inputs(ALL_SHAPES[shape], torch.float32))


@pytest.mark.parametrize("shape", ["k2 3-D", "k2 vector", "ragged last row empty", "ragged empty", "k20"])
@pytest.mark.usefixtures("on_interpreter")
def test_configurations_that_would_run_without_measuring(shape):
    assert_product_correct(PATHS["bypass"], make_inputs(ALL_SHAPES[shape], torch.bfloat16, torch.float32))


@pytest.mark.parametrize("entries", [1, (3, 60, 0)], ids=["an input of 70 rows", "a row of 60 entries"])
@pytest.mark.usefixtures("on_interpreter")
def test_neurons_with_very_many_entries(entries):
    """More than are summed side by side with those of others."""
    shape = Shape((3,), 1, 70, entries) if entries == 1 else Shape((3,), 64, 3, entries)
    case = Case.draw(shape, FLOAT, "contiguous")
    support, (_, ends) = case.support, case.support.transposed()
    longest = max(int((ends[1:] - ends[:-1]).max()), *(entries if isinstance(entries, tuple) else (0, 0)))
    assert longest > launch.LIGHT + 1 and support.entries >= longest
    assert_case_correct(case, bypass(case.result, case.x, case.values, *case.support_tensors()))


@pytest.mark.parametrize("entries", [1, 3, (0, 3, 1, 9, 0, 2)], ids=["k1", "k3", "ragged"])
@pytest.mark.usefixtures("kernel")
def test_values_and_indices_may_be_slices(entries):
    """As `vmap` over a last dimension takes them."""
    case = Case.draw(Shape((5,), 9, 6, entries), FLOAT, "contiguous")

    def slice_of(tensor):
        return torch.stack([torch.full_like(tensor, 8), tensor.detach()], -1).select(-1, 1)

    case.values = slice_of(case.values).requires_grad_()
    case.support = Support(slice_of(case.support.indices), 9, case.support.offsets)
    assert not case.values.is_contiguous()
    assert_case_correct(case, bypass(case.result, case.x, case.values, *case.support_tensors()))


@pytest.mark.parametrize("tokens", [1, 15, 33, 47])
@pytest.mark.parametrize("entries", [1, (0, 3, 1, 9, 0, 2)], ids=["table", "ragged"])
def test_parts_of_tokens_give_the_whole_and_the_same_bits_again(kernel, monkeypatch, entries, tokens):
    monkeypatch.setattr(launch, "MIN_SPAN", 4)
    case = Case.draw(Shape((tokens,), 9, 6, entries), BFLOAT, "contiguous")
    assert launch.splits_of(tokens, case.support.entries)[0] == -(-tokens // 16)
    arguments = (case.grad, case.x.detach(), case.support.indices, case.support.offsets)
    first = sparse_grad_values(*arguments)
    assert_rounded_once(first, *case.expected()["gradient of values"], torch.float32)
    assert torch.equal(first, sparse_grad_values(*arguments))


@pytest.mark.parametrize("entries", [2, (0, 3, 1, 9, 0, 2)], ids=["table", "ragged"])
def test_every_element_is_written(kernel, monkeypatch, entries):
    """Memory that nothing wrote to reads as NaN here."""
    monkeypatch.setattr(launch, "MIN_SPAN", 4)
    case = Case.draw(Shape((21,), 9, 6, entries), FLOAT, "contiguous")
    indices, offsets, *transposed = case.support_tensors()
    result, x, values = case.result.detach(), case.x.detach(), case.values.detach()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        outputs = (
            sparse_add(result, x, values, indices, offsets),
            sparse_grad_values(case.grad, x, indices, offsets),
            sparse_grad_input(case.grad, values, indices, offsets, *transposed, torch.float32),
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(output.isnan().any() for output in outputs)


@pytest.mark.parametrize("entries", [2, (0, 3, 1, 5, 0, 2)], ids=["table", "ragged"])
def test_infinities_stay_where_they_are_read(kernel, entries):
    """Inputs that no entry reads, and lanes beyond the ends, do not turn sums into NaN."""
    case = Case.draw(Shape((5,), 9, 6, entries), FLOAT, "contiguous")
    indices, x = case.support.indices, case.x.detach().clone()
    unread = sorted(set(range(9)) - set(indices.reshape(-1).tolist()))
    assert unread
    x[:, unread] = torch.inf
    read = int(indices.reshape(-1)[0])
    x[1, read] = torch.inf
    out = sparse_add(case.result.detach(), x, case.values.detach(), indices, case.support.offsets)
    readers = (dense_update(case.values.detach(), case.support)[:, read] != 0).nonzero().flatten().tolist()
    assert [(token, row) for token, row in (~out.isfinite()).nonzero().tolist()] == [(1, row) for row in readers]


def test_addresses_pass_2_to_the_31(kernel, tmp_path):
    """Tokens and columns each lie 2^31 elements apart, in a sparse file of which a few pages exist."""
    case = Case.draw(Shape((3,), 9, 5, 3), BFLOAT, "contiguous")

    def far_apart(name, matrix):
        strides = (2**30 + 1, 2**28 + 1)
        elements = sum(stride * size for stride, size in zip(strides, matrix.shape, strict=True))
        storage = torch.UntypedStorage.from_file(str(tmp_path / name), True, 2 * elements)
        return torch.empty(0, dtype=matrix.dtype).set_(storage, 0, matrix.shape, strides).copy_(matrix)

    x, result, grad = (far_apart(n, t) for n, t in (("x", case.x), ("result", case.result), ("grad", case.grad)))
    indices, offsets, *transposed = case.support_tensors()
    values = case.values.detach()
    expected = case.expected()
    results = {
        "gradient of x": sparse_grad_input(grad, values, indices, offsets, *transposed, torch.bfloat16),
        "gradient of values": sparse_grad_values(grad, x, indices, offsets),
        "output": launch.add(result, x, values, indices, offsets, out=result),
    }
    for name, found in results.items():
        assert_rounded_once(found.contiguous(), *expected[name], found.dtype)
