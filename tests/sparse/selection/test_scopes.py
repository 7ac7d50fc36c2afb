"""Who competes with whom: exact sets, ties to the lowest index, against sorted Python lists."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_ext.sparse.selection.scopes import top_overall, top_per_neuron

from .._asserts import assert_same_support
from ._oracle import best_overall, best_per_row


QUICK = settings(max_examples=60, deadline=None, derandomize=True)
# Few distinct values, so that ties are the rule; extremes and both zeros among them.
SCORES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 1e-45, -1e-45, 3e38, -3e38]) | st.floats(-4, 4, width=16)


@st.composite
def matrices(draw):
    height, width = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    return torch.tensor(draw(st.lists(SCORES, min_size=height * width, max_size=height * width))).view(height, width)


ZEROS = [torch.tensor([[0.0, -0.0, 0.0, -0.0]]), torch.tensor([[-0.0, 0.0, -0.0, 0.0]])]


@QUICK
@given(scores=matrices(), share=st.floats(0, 1), step=st.integers(1, 5))
@example(scores=ZEROS[0], share=0.5, step=1)
@example(scores=ZEROS[1], share=0.5, step=1)
def test_per_neuron_is_the_sorted_top_of_each_row(scores, share, step):
    rows, fan_in = scores.shape
    k = 1 + int(share * (fan_in - 1))
    support = top_per_neuron(scores.split(step), k, fan_in)
    assert support.indices.shape == (rows, k) and support.indices.dtype == torch.int32
    assert support.indices.tolist() == best_per_row(scores, k)


@QUICK
@given(matrices=st.lists(matrices(), min_size=1, max_size=4), share=st.floats(0, 1), step=st.integers(1, 5))
@example(matrices=ZEROS, share=0.5, step=1)
@example(matrices=[torch.zeros(3, 4), torch.ones(2, 4)], share=0.4, step=2)  # the first gets nothing
def test_overall_is_the_sorted_top_of_all_weights(matrices, share, step):
    scores = {f"module {number}": matrix for number, matrix in enumerate(matrices)}
    budget = max(1, round(share * sum(matrix.numel() for matrix in matrices)))
    passes = {module: lambda matrix=matrix: matrix.split(step) for module, matrix in scores.items()}
    supports = top_overall(passes, budget, {module: matrix.shape[1] for module, matrix in scores.items()})
    assert sum(support.entries for support in supports.values()) == budget
    for module, expected in best_overall(scores, budget).items():
        assert_same_support(supports[module], expected)
        supports[module].check()


@pytest.mark.parametrize("values", ["normal", "few", "bits"])
@pytest.mark.parametrize("layout", ["rows", "columns", "part"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fan_in", [31, 1003, 2**16 + 5])
def test_long_rows_are_those_of_a_stable_sort(fan_in, dtype, layout, values):
    """Rows long enough that groups of entries are compared first, of all finite bit patterns, zeros and denormals."""
    generator = torch.Generator().manual_seed(fan_in)
    shape = {"rows": (3, fan_in), "columns": (fan_in, 3), "part": (3, fan_in + 9)}[layout]
    if values == "bits":
        width = torch.int32 if dtype == torch.float32 else torch.int16
        info = torch.iinfo(width)
        scores = torch.randint(info.min, info.max, shape, generator=generator).to(width).view(dtype)
        scores = torch.where(scores.isfinite(), scores, -0.0)
    else:
        scores = torch.randn(shape, generator=generator).mul(1 if values == "few" else 1e5).round().to(dtype)
    scores = {"rows": scores, "columns": scores.t(), "part": scores[:, 4 : fan_in + 4]}[layout]
    order = scores.float().sort(dim=1, descending=True, stable=True).indices
    for k in sorted({1, 2, 20, min(200, fan_in), fan_in - 1}):
        support = top_per_neuron([scores[:2], scores[2:]], k, fan_in)
        assert torch.equal(support.indices.long(), order[:, :k].sort(dim=1).values)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.0, 1e-45], ids=str)
@pytest.mark.parametrize("k", [1, 2, 63, 64, 699, 700])
def test_a_constant_row_gives_its_first_columns(value, k):
    """Long rows: a sort that is not stable mixes these up, and only long rows show it."""
    support = top_per_neuron([torch.full((3, 700), value)], k, 700)
    assert support.indices.tolist() == [list(range(k))] * 3


@pytest.mark.parametrize("budget", [1, 699, 700, 701, 2099, 2100, 2101, 2800])
def test_constant_weights_give_their_first_entries_in_module_order(budget):
    scores = {"a": torch.ones(3, 700), "b": torch.ones(1, 700)}
    supports = top_overall({m: lambda s=s: s.split(2) for m, s in scores.items()}, budget, {"a": 700, "b": 700})
    counts = torch.cat([supports[module].offsets.diff() for module in ("a", "b")]).tolist()
    assert counts == [min(700, max(0, budget - 700 * row)) for row in range(4)]
    columns = torch.cat([supports[module].indices for module in ("a", "b")]).tolist()
    assert columns == [column for count in counts for column in range(count)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [1, 1000, 5000, 19999])
def test_overall_separates_neighbouring_floats(seed, budget):
    """Scores that differ in their last bits fall into one bin of the first histogram."""
    bits = 0x3F800000 + torch.randint(0, 2**14, (100, 200), generator=torch.Generator().manual_seed(seed))
    scores = bits.to(torch.int32).view(torch.float32)
    support = top_overall({"m": lambda: scores.split(7)}, budget, {"m": 200})["m"]
    assert_same_support(support, best_overall({"m": scores}, budget)["m"])
