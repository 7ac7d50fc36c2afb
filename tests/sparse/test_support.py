"""Supports: their transpose, their checks, unions, types on disk."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_ext.sparse.support import (
    Support,
    narrowest_index_dtype,
    offsets_from_counts,
    row_of_entry,
    union,
)

from ._asserts import assert_same_support, positions
from ._inputs import random_support


QUICK = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def supports(draw, rows=None, fan_in=None):
    rows, fan_in = rows or draw(st.integers(1, 6)), fan_in or draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    counts = st.integers(0, fan_in)
    entries = draw(counts | st.lists(counts, min_size=rows, max_size=rows))
    return random_support(rows, fan_in, entries, generator)


@st.composite
def supports_of_one_weight(draw):
    rows, fan_in = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    return draw(st.lists(supports(rows, fan_in), min_size=1, max_size=4))


@QUICK
@given(support=supports())
def test_sizes_and_rows_of_entries(support):
    entries = positions(support)
    assert support.entries == len(entries)
    assert row_of_entry(support.indices, support.offsets).tolist() == [row for row, _ in entries]
    assert support.row_of_entry().tolist() == [row for row, _ in entries]


@QUICK
@given(support=supports(), transposed=st.booleans())
def test_gather_and_scatter_are_inverse(support, transposed):
    matrix = torch.arange(support.rows * support.fan_in, dtype=torch.float64).view(support.rows, support.fan_in)
    matrix = matrix.t().contiguous().t() if transposed else matrix
    values = support.gather(matrix)
    assert values.shape == support.indices.shape
    assert values.reshape(-1).tolist() == [row * support.fan_in + column for row, column in positions(support)]
    target = torch.full_like(matrix, -1.0)
    support.scatter_(target, values)
    assert torch.equal(support.gather(target), values)
    assert int((target == -1.0).sum()) == target.numel() - support.entries


@QUICK
@given(support=supports())
def test_transposed_lists_every_entry_once_by_column(support):
    entries, offsets = support.transposed()
    assert entries.dtype == offsets.dtype == torch.int32
    assert sorted(entries.tolist()) == list(range(support.entries))
    assert offsets.shape == (support.fan_in + 1,) and int(offsets[0]) == 0 and int(offsets[-1]) == support.entries
    places = positions(support)
    for column in range(support.fan_in):
        of_column = entries[offsets[column] : offsets[column + 1]].tolist()
        assert {places[entry][1] for entry in of_column} <= {column}
        rows = [places[entry][0] for entry in of_column]
        assert rows == sorted(rows)  # so that sums have one order on every run


@QUICK
@given(support=supports())
def test_transposed_twice_is_the_support(support):
    entries, offsets = support.transposed()
    rows = support.row_of_entry()[entries.long()].to(torch.int32)
    back, ends = Support(rows, support.rows, offsets).transposed()
    columns = row_of_entry(rows, offsets)[back.long()]
    assert columns.tolist() == support.indices.reshape(-1).tolist()
    assert ends.diff().tolist() == torch.bincount(support.row_of_entry(), minlength=support.rows).tolist()


@QUICK
@given(support=supports())
def test_check_accepts_what_is_whole(support):
    support.check()


BROKEN = {
    "negative": ([[0, 1], [-1, 2]], None, "-1..2"),
    "at the fan-in": ([[0, 1], [2, 4]], None, "0..4"),
    "repeated": ([[0, 1], [2, 2]], None, "increasing"),
    "decreasing": ([[0, 1], [3, 2]], None, "increasing"),
    "ragged, negative": ([-1, 2, 3], [0, 2, 3], "-1..3"),
    "ragged, at the fan-in": ([0, 2, 4], [0, 2, 3], "0..4"),
    "ragged, repeated": ([2, 2, 3], [0, 2, 3], "increasing"),
    "ragged, decreasing": ([2, 1, 3], [0, 2, 3], "increasing"),
    "starts late": ([0, 2, 3], [1, 2, 3], "offsets"),
    "ends early": ([0, 2, 3], [0, 2, 2], "offsets"),
    "ends late": ([0, 2, 3], [0, 2, 4], "offsets"),
    "goes back": ([0, 2, 3], [0, 3, 2, 3], "offsets"),
    "entries without rows": ([0, 2, 3], [0, 0, 0], "offsets"),
    "rows without entries": ([], [0, 1, 1], "offsets"),
}


@pytest.mark.parametrize(("indices", "offsets", "message"), BROKEN.values(), ids=BROKEN)
def test_check_refuses_a_broken_support(indices, offsets, message):
    tensors = [None if numbers is None else torch.tensor(numbers, dtype=torch.int32) for numbers in (indices, offsets)]
    with pytest.raises(ValueError, match=message):
        Support(tensors[0], 4, tensors[1]).check()


def test_check_lets_a_row_start_below_the_end_of_the_one_before():
    Support(torch.tensor([[2, 3], [0, 1]], dtype=torch.int32), 4).check()
    Support(torch.tensor([2, 3, 0], dtype=torch.int32), 4, torch.tensor([0, 2, 3], dtype=torch.int32)).check()


@QUICK
@given(several=supports_of_one_weight())
def test_union_holds_exactly_the_entries_of_all(several):
    whole, places = union(several)
    whole.check()
    of_union = positions(whole)
    assert set(of_union) == {entry for support in several for entry in positions(support)}
    assert len(of_union) == len(set(of_union))
    counts = {row: sum(other == row for other, _ in of_union) for row in range(whole.rows)}
    assert whole.is_table == (len(set(counts.values())) == 1)
    assert (whole.rows, whole.fan_in) == (several[0].rows, several[0].fan_in)
    for support, place in zip(several, places, strict=True):
        assert [of_union[number] for number in place.tolist()] == positions(support)


@QUICK
@given(support=supports())
def test_union_with_itself_changes_no_entry(support):
    whole, places = union([support, support])
    assert positions(whole) == positions(support)
    assert torch.equal(places[0], places[1])
    if support.is_table:
        assert_same_support(whole, support)


@pytest.mark.parametrize(
    ("fan_in", "expected"),
    [
        (1, torch.uint8),
        (255, torch.uint8),
        (256, torch.uint8),
        (257, torch.uint16),
        (65535, torch.uint16),
        (65536, torch.uint16),
        (65537, torch.int32),
    ],
)
def test_narrowest_index_type_holds_the_last_column_and_no_wider_one_is_taken(fan_in, expected):
    dtype = narrowest_index_dtype(fan_in)
    assert dtype == expected
    last = torch.tensor([[0, fan_in - 1]], dtype=torch.int32)
    assert torch.equal(last.to(dtype).to(torch.int32), last)


@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=9))
@QUICK
def test_offsets_from_counts(counts):
    offsets = offsets_from_counts(torch.tensor(counts))
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == [sum(counts[:row]) for row in range(len(counts) + 1)]
