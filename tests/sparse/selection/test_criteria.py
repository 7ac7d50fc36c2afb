"""What entries are ranked by."""

import pytest
import torch

from peft_ext.sparse.selection import criteria
from peft_ext.sparse.selection.criteria import Magnitude, Random, Reverse, Scored


def _scores(criterion, weight, module="m"):
    return torch.cat(list(criterion.chunks(module, weight)))


WEIGHT = torch.tensor([[3.0, -4.0, 0.5], [-1.0, 0.0, 2.0]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        (Magnitude(), [[3.0, 4.0, 0.5], [1.0, 0.0, 2.0]]),
        (Reverse(), [[-3.0, -4.0, -0.5], [-1.0, 0.0, -2.0]]),
        (Scored({"m": 2 * WEIGHT.flip(1)}), [[1.0, 8.0, 6.0], [4.0, 0.0, 2.0]]),
    ],
    ids=["magnitude", "reverse", "gradient"],
)
def test_scores(criterion, expected, dtype):
    assert torch.equal(_scores(criterion, WEIGHT.to(dtype)).float(), torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_of_16_bit_weights_are_exact(dtype):
    weight = torch.randn(20, 30).to(dtype)
    assert torch.equal(_scores(Magnitude(), weight).double(), weight.double().abs())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "criterion", [Magnitude(), Reverse(), Random(0), Scored({"block.linear": torch.ones(5, 4)})], ids=type
)
def test_a_weight_that_is_not_finite_is_an_error_that_names_the_module(monkeypatch, criterion, dtype, value):
    monkeypatch.setattr(criteria, "CHUNK_ELEMENTS", 4)  # the last chunk is checked too
    weight = torch.ones(5, 4, dtype=dtype)
    _scores(criterion, weight, "block.linear")
    weight[4, 3] = value
    with pytest.raises(ValueError, match=r"weights of module 'block\.linear' .* `exclude_modules"):
        _scores(criterion, weight, "block.linear")


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_scores_that_are_not_finite_are_an_error_that_names_the_module(value):
    scores = torch.ones(5, 4)
    scores[2, 1] = value
    with pytest.raises(ValueError, match=r"scores of module 'block\.linear'"):
        _scores(Scored({"block.linear": scores}), torch.ones(5, 4), "block.linear")


def test_random_scores_repeat_and_differ_between_seeds_and_modules():
    weight = torch.ones(20, 30)
    scores = _scores(Random(3), weight, "a")
    assert torch.equal(scores, _scores(Random(3), weight, "a"))
    assert not torch.equal(scores, _scores(Random(4), weight, "a"))
    assert not torch.equal(scores, _scores(Random(3), weight, "b"))


def test_random_scores_depend_on_neither_the_weight_nor_the_global_generator():
    torch.manual_seed(1)
    scores = _scores(Random(3), torch.ones(20, 30))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(scores, _scores(Random(3), torch.randn(20, 30).to(torch.bfloat16)))
    assert not torch.equal(before, torch.get_rng_state())  # by the weight just drawn
    before = torch.get_rng_state()
    _scores(Random(3), torch.ones(20, 30))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("criterion", [Magnitude(), Reverse(), Random(0), Scored({"m": torch.randn(23, 7)})], ids=type)
@pytest.mark.parametrize("elements", [1, 7, 20, 100])
def test_chunks_are_bounded_and_make_up_the_whole(monkeypatch, criterion, elements):
    weight = torch.randn(23, 7)
    whole = _scores(criterion, weight)
    monkeypatch.setattr(criteria, "CHUNK_ELEMENTS", elements)
    chunks = list(criterion.chunks("m", weight))
    assert max(chunk.numel() for chunk in chunks) <= max(7, elements)
    assert len(chunks) > 1
    assert torch.equal(torch.cat(chunks), whole)
