"""Each selection on whole sets of weights: criterion, scope, budget, ties, chunks, randomness."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_ext.sparse.selection import criteria
from peft_ext.sparse.selection.criteria import Magnitude, Random, Reverse, Scored
from peft_ext.sparse.selection.plan import SCORED, SELECTIONS, parse_selection, select_supports

from .._asserts import assert_same_support
from ._oracle import best_overall, best_per_row


CRITERIA = ("magnitude", "reverse", "random", "gradient", "activation")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODULES = {"block.0.up": (6, 10), "block.0.down": (4, 3), "block.1.up": (5, 10)}


def _weights(dtype=torch.float32, seed=0, values=None):
    """Random weights; `values`: how many distinct magnitudes, so that ties abound, or "near" for such that only wide
    types tell apart. The second is stored transposed."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in MODULES.items():
        weight = torch.randn(shape, generator=generator)
        if values == "near":
            weight = 1 + weight / 1000
        elif values is not None:
            weight = torch.randint(-values, values + 1, shape, generator=generator) / 4.0
        weights[name] = weight.to(dtype)
    weights["block.0.down"] = weights["block.0.down"].t().contiguous().t()
    return weights


def _views(tensors):
    return {name: lambda tensor=tensor: tensor for name, tensor in tensors.items()}


def _select(weights, selection, k, **options):
    scores = _views({name: weight.flip(0) for name, weight in weights.items()})
    return select_supports(_views(weights), selection, k, scores=scores, **options)


def _scores(weights, selection, seed=0):
    """What a selection ranks by, stated anew, in fp32; random numbers are the criterion's own."""
    criterion, _ = parse_selection(selection)
    rank = {
        "magnitude": lambda name, weight: weight.float().abs(),
        "reverse": lambda name, weight: -weight.float().abs(),
        "gradient": lambda name, weight: weight.flip(0).float().abs(),
        "activation": lambda name, weight: weight.flip(0).float().abs(),
        "random": lambda name, weight: torch.cat(list(Random(seed).chunks(name, weight))),
    }[criterion]
    return {name: rank(name, weight) for name, weight in weights.items()}


def _budget(weights, k):
    return sum(rows * min(k, fan_in) for rows, fan_in in (weight.shape for weight in weights.values()))


@pytest.mark.parametrize("values", [None, 0, 1, 3, "near"], ids=["distinct", "zero", "3 values", "7 values", "near"])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_selection_is_that_of_a_dense_sort(selection, dtype, values):
    """Among them all of the budget, and no more."""
    weights = _weights(dtype, values=values)
    scores = _scores(weights, selection)
    _, scope = parse_selection(selection)
    for k in (1, 3, 10, 50):
        supports = _select(weights, selection, k)
        assert list(supports) == list(weights)
        overall = best_overall(scores, _budget(weights, k)) if scope == "network" else {}
        for name, weight in weights.items():
            supports[name].check()
            assert (supports[name].rows, supports[name].fan_in) == weight.shape
            if scope == "neuron":
                assert supports[name].is_table
                assert supports[name].indices.tolist() == best_per_row(scores[name], min(k, weight.shape[1]))
            elif scope == "layer":
                expected = best_overall({name: scores[name]}, _budget({name: weight}, k))[name]
                assert_same_support(supports[name], expected)
            else:
                assert_same_support(supports[name], overall[name])


@pytest.mark.parametrize("values", [None, 2], ids=["distinct", "ties"])
@pytest.mark.parametrize("elements", [1, 9, 10, 25])
@pytest.mark.parametrize(
    ("selection", "ratio"), [(name, 1.0) for name in SELECTIONS] + [(name, 0.5) for name in CRITERIA]
)
def test_chunks_change_nothing(monkeypatch, selection, ratio, elements, values):
    weights = _weights(values=values)
    whole = _select(weights, selection, 3, neuron_ratio=ratio)
    monkeypatch.setattr(criteria, "CHUNK_ELEMENTS", elements)
    for name, support in _select(weights, selection, 3, neuron_ratio=ratio).items():
        assert_same_support(support, whole[name])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    magnitudes=st.lists(st.integers(0, 3), min_size=24, max_size=24),
    signs=st.lists(st.sampled_from([-1, 1]), min_size=24, max_size=24),
    k=st.integers(1, 6),
    dtype=st.sampled_from([torch.float64, *DTYPES]),
)
def test_signs_and_dtypes_of_small_numbers_do_not_matter(magnitudes, signs, k, dtype):
    """|w| ranks, and integers are exact in each dtype: supports can be recomputed from a cast checkpoint."""
    weight = torch.tensor(magnitudes, dtype=torch.float32).view(4, 6)
    signed = (weight.reshape(-1) * torch.tensor(signs)).view(4, 6).to(dtype)
    for selection in ("magnitude", "reverse", "magnitude_network", "reverse_layer"):
        expected = _select({"m": weight}, selection, k)["m"]
        assert_same_support(_select({"m": signed}, selection, k)["m"], expected)


@pytest.mark.parametrize("selection", ["random", "random_layer", "random_network"])
def test_random_repeats_and_differs_between_seeds_and_modules(selection):
    weights = {"a": torch.ones(30, 40), "b": torch.ones(30, 40)}
    supports = _select(weights, selection, 4, seed=1)
    for name, again in _select(weights, selection, 4, seed=1).items():
        assert_same_support(again, supports[name])
    columns = [supports[name].indices.reshape(-1).tolist() for name in weights]
    assert columns[0] != columns[1]
    for seed in (0, 2, 2**31 - 1):
        other = _select(weights, selection, 4, seed=seed)
        assert other["a"].indices.reshape(-1).tolist() != columns[0]


def test_random_scores_depend_on_neither_the_weight_nor_the_global_generator():
    weights = torch.ones(20, 30), torch.randn(20, 30).to(torch.bfloat16)
    before = torch.get_rng_state()
    scores = [torch.cat(list(Random(3).chunks("m", weight))) for weight in weights]
    assert torch.equal(*scores) and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("selection", ["random", "random_layer", "random_network"])
def test_random_prefers_no_input(selection):
    rows, fan_in, k = 4000, 8, 2
    support = _select({"m": torch.ones(rows, fan_in)}, selection, k)["m"]
    counts = torch.bincount(support.indices.reshape(-1), minlength=fan_in)
    expected, share = rows * k / fan_in, k / fan_in
    assert (counts - expected).abs().max() < 5 * (rows * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("ratio", [1e-9, 0.1, 0.25, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("selection", CRITERIA)
def test_neuron_ratio_keeps_that_share_of_the_neurons_whole(selection, rows, ratio):
    weights = {"m": torch.randn(rows, 9)}
    full = _select(weights, selection, 3)["m"]
    part = _select(weights, selection, 3, neuron_ratio=ratio)["m"]
    part.check()
    if ratio == 1.0:
        assert_same_support(part, full)
        return
    counts = part.offsets.diff().tolist()
    kept = [row for row, count in enumerate(counts) if count]
    assert len(kept) == max(1, round(ratio * rows))
    assert {counts[row] for row in kept} == {3}
    assert part.indices.view(-1, 3).tolist() == [full.indices.tolist()[row] for row in kept]


def test_neurons_kept_are_random_by_seed_and_module():
    weights = {"a": torch.randn(60, 5), "b": torch.randn(60, 5)}

    def kept(name, seed):
        return _select(weights, "magnitude", 1, neuron_ratio=0.5, seed=seed)[name].offsets.tolist()

    assert kept("a", 0) == kept("a", 0)
    assert kept("a", 0) != kept("a", 1)
    assert kept("a", 0) != kept("b", 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_numbers_that_are_not_finite_are_an_error_that_names_the_module(monkeypatch, selection, dtype, value):
    monkeypatch.setattr(criteria, "CHUNK_ELEMENTS", 4)  # the last chunk is checked too
    weights, broken = _weights(dtype), _weights(dtype)
    broken["block.1.up"][4, 9] = value
    whole, broken = _views(weights), _views(broken)
    with pytest.raises(ValueError, match=r"weights of module 'block\.1\.up' .* `exclude_modules"):
        select_supports(broken, selection, 2, scores=whole)
    if selection.startswith(SCORED):
        with pytest.raises(ValueError, match=r"scores of module 'block\.1\.up'"):
            select_supports(whole, selection, 2, scores=broken)


@pytest.mark.parametrize(
    "criterion", [Magnitude(), Reverse(), Random(0), Scored({"m": lambda: torch.randn(23, 7)})], ids=type
)
@pytest.mark.parametrize("elements", [1, 7, 20, 100])
def test_chunks_are_bounded(monkeypatch, criterion, elements):
    monkeypatch.setattr(criteria, "CHUNK_ELEMENTS", elements)
    chunks = list(criterion.chunks("m", torch.randn(23, 7)))
    assert len(chunks) > 1 and max(chunk.numel() for chunk in chunks) <= max(7, elements)


@pytest.mark.parametrize("selection", ["", "magnitudes", "neuron", "magnitude_neuron", "Magnitude"])
def test_an_unknown_selection_is_an_error_that_lists_the_known_ones(selection):
    with pytest.raises(ValueError, match="magnitude, magnitude_layer"):
        parse_selection(selection)


def test_selections_are_every_criterion_in_every_scope():
    assert {parse_selection(name) for name in SELECTIONS} == {
        (criterion, scope) for criterion in CRITERIA for scope in ("neuron", "layer", "network")
    }
