"""The Triton kernels, in the interpreter: output and every gradient equal those of dense matrices."""

import pytest
import torch

from peft_ext.sparse.ops import add_in_place, bypass, may_add_in_place
from peft_ext.sparse.ops.bypass import sparse_grad_input, sparse_grad_values
from peft_ext.sparse.ops.gpu import launch
from peft_ext.sparse.support import Support

from ..._asserts import assert_product_correct, dense_update
from ..._inputs import SHAPES as ALL_SHAPES
from ..._inputs import Shape, make_inputs
from .._paths import PATHS
from ._cases import DTYPES, SHAPES, Case, assert_case_correct, assert_rounded_once, each_in_a_layout


FLOAT = (torch.float32,) * 3
BFLOAT = (torch.bfloat16, torch.bfloat16, torch.float32)


def named(case):
    return case if isinstance(case, str) else " ".join(str(dtype)[6:] for dtype in case)


@pytest.mark.parametrize(("shape", "dtypes", "layout"), each_in_a_layout(SHAPES, DTYPES), ids=named)
def test_output_and_gradients_are_fp32_sums_rounded_once(kernel, on_interpreter, shape, dtypes, layout):
    case = Case.draw(SHAPES[shape], dtypes, layout)
    assert_case_correct(case, bypass(case.result, case.x, case.values, *case.support_tensors()))
    names = ["gather_sum", "gather_sum", "grad_values"]
    if kernel == "staged":
        uneven = ["_uneven" if case.support.offsets is not None else "", "_uneven", ""]
        names = [f"{name}_staged{suffix}" for name, suffix in zip(names, uneven, strict=True)]
    if kernel == "columns_first":
        names = ["transposed", "gather_sum", "transposed", "gather_sum", "grad_values"]
    assert on_interpreter == names


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


# Around two entries, which are summed side by side here, and rounds of 8 that start at multiples of 16.
UNEVEN = {
    "one neuron owns all": Shape((3,), 64, 3, (0, 60, 0)),
    "one input read by all": Shape((3,), 1, 70, 1),
    "rounds end inside": Shape((5,), 33, 9, (7, 1, 0, 3, 2, 3, 16, 0, 9)),
    "rounds end between": Shape((5,), 33, 9, (8, 8, 0, 16, 1, 7, 0, 2, 1)),
    "first and last of a block": Shape((5,), 33, 9, (9, 0, 2, 3, 11, 0, 0, 4, 33)),
    "empty blocks": Shape((5,), 33, 14, (0, 0, 0, 0, 1, 0, 0, 19, 0, 0, 0, 0, 0, 2)),
}


@pytest.mark.parametrize(("shape", "dtypes", "layout"), each_in_a_layout(UNEVEN, [FLOAT, BFLOAT]), ids=named)
@pytest.mark.usefixtures("kernel")
def test_neurons_of_very_different_lengths(shape, dtypes, layout):
    case = Case.draw(UNEVEN[shape], dtypes, layout)
    assert_case_correct(case, bypass(case.result, case.x, case.values, *case.support_tensors()))


@pytest.mark.parametrize("count", [launch.LIGHT, launch.LIGHT + 1, 2 * launch.LIGHT, 2 * launch.LIGHT + 1])
@pytest.mark.usefixtures("on_interpreter")
def test_as_many_entries_as_are_summed_side_by_side(count):
    case = Case.draw(Shape((3,), 2 * count, 3, (3, count, 0)), FLOAT, "contiguous")
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


@pytest.mark.parametrize("ahead", [0, 8])
@pytest.mark.parametrize("tokens", [1, 15, 33, 47])
@pytest.mark.parametrize("entries", [1, 4, (0, 3, 1, 9, 0, 2)], ids=["k1", "k4", "ragged"])
def test_parts_of_tokens_give_the_whole_and_the_same_bits_again(kernel, monkeypatch, entries, tokens, ahead):
    monkeypatch.setattr(launch, "MIN_SPAN", 4)
    monkeypatch.setattr(launch, "WORDS_AHEAD", ahead)
    case = Case.draw(Shape((tokens,), 9, 6, entries), BFLOAT, "contiguous")
    assert launch.splits_of(tokens, case.support.entries)[0] == -(-tokens // 16)
    arguments = (case.grad, case.x.detach(), *case.support_tensors(), None, [])
    first = sparse_grad_values(*arguments)
    assert_rounded_once(first, *case.expected()["gradient of values"], torch.float32)
    assert torch.equal(first, sparse_grad_values(*arguments))


@pytest.mark.parametrize("entries", [2, (0, 3, 1, 9, 0, 2)], ids=["table", "ragged"])
def test_every_element_is_written(kernel, monkeypatch, entries):
    """Memory that nothing wrote to reads as NaN here."""
    monkeypatch.setattr(launch, "MIN_SPAN", 4)
    case = Case.draw(Shape((21,), 9, 6, entries), FLOAT, "contiguous")
    tables = case.support_tensors()
    result, x, values = case.result.detach(), case.x.detach(), case.values.detach()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        outputs = (
            bypass(result, x, values, *tables),
            sparse_grad_values(case.grad, x, *tables, None, []),
            sparse_grad_input(case.grad, (9,), torch.float32, values, *tables, None, []),
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
    out = bypass(case.result.detach(), x, case.values.detach(), *case.support_tensors())
    readers = (dense_update(case.values.detach(), case.support)[:, read] != 0).nonzero().flatten().tolist()
    assert [(token, row) for token, row in (~out.isfinite()).nonzero().tolist()] == [(1, row) for row in readers]


@pytest.mark.parametrize("entries", [2, (9, 1, 0, 5, 0, 2)], ids=["table", "ragged"])
@pytest.mark.usefixtures("kernel")
def test_a_row_whose_gradient_is_not_finite_reaches_its_own_inputs_only(entries):
    case = Case.draw(Shape((5,), 9, 6, entries), FLOAT, "contiguous")
    case.grad[1, 3] = torch.nan
    values = case.values.detach()
    out = sparse_grad_input(case.grad, (9,), torch.float32, values, *case.support_tensors(), None, [])
    read = dense_update(values, case.support)[3].nonzero().flatten().tolist()
    assert 0 < len(read) < 9
    assert out.isnan().nonzero().tolist() == [[1, column] for column in read]


def test_addresses_pass_2_to_the_31(kernel, tmp_path):
    """Tokens and columns each lie 2^31 elements apart, in a sparse file of which a few pages exist."""
    case = Case.draw(Shape((3,), 9, 5, 3), BFLOAT, "contiguous")

    def far_apart(name, matrix):
        strides = (2**30 + 1, 2**28 + 1)
        elements = sum(stride * size for stride, size in zip(strides, matrix.shape, strict=True))
        storage = torch.UntypedStorage.from_file(str(tmp_path / name), True, 2 * elements)
        return torch.empty(0, dtype=matrix.dtype).set_(storage, 0, matrix.shape, strides).copy_(matrix)

    x, result, grad = (far_apart(n, t) for n, t in (("x", case.x), ("result", case.result), ("grad", case.grad)))
    tables, values, expected = case.support_tensors(), case.values.detach(), case.expected()
    results = {
        "gradient of x": sparse_grad_input(grad, (9,), torch.bfloat16, values, *tables, None, []),
        "gradient of values": sparse_grad_values(grad, x, *tables, None, []),
        "output": launch.add(result, x, values, *tables[:2], out=result),
    }
    for name, found in results.items():
        assert_rounded_once(found.contiguous(), *expected[name], found.dtype)
