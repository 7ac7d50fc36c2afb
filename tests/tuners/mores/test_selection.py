"""Which tokens are chosen, compared with loops over groups."""

import itertools

import pytest
import torch

from peft_ext.tuners.mores.selection import SELECTIONS, parse_positions, select_positions, select_tokens


MASKS = {
    "one image": ["..xxxxxxxxxxxx..."],
    "two images": [".xxxxxxx..xxxxxxxxx"],
    "padded rows": ["......xxxxxxxxxx...", "..xxxx...xxxxxxx..."],
    "up to the edges": ["xxxxx", "xxxxx", ".xxxx"],
    "none": [".....", "....."],
    "one token": ["..x..", "....."],
}


def mask_of(rows):
    return torch.tensor([[character == "x" for character in row] for row in rows])


def groups(mask, grouping):
    """Positions `(row, token)` of each group."""
    for row, tokens in enumerate(mask.tolist()):
        if grouping == "sample":
            runs = [[i for i, x in enumerate(tokens) if x]]
        else:
            runs = [[i for i, _ in run] for x, run in itertools.groupby(enumerate(tokens), lambda pair: pair[1]) if x]
        yield from ([(row, token) for token in run] for run in runs if run)


def expected_ranks(selection, size, wanted):
    if selection == "ends":
        return set(range(wanted // 2)) | set(range(size - (wanted - wanted // 2), size))
    return {"first": set(range(wanted)), "last": set(range(size - wanted, size)), "all": set(range(size))}[selection]


@pytest.mark.parametrize("grouping", ["image", "sample"])
@pytest.mark.parametrize("selection", ["ends", "first", "last", "all"])
@pytest.mark.parametrize("ratio", [0.001, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS.keys())
def test_selection_equals_a_loop_over_groups(rows, ratio, selection, grouping):
    mask = mask_of(rows)
    chosen = torch.zeros_like(mask)
    for group in groups(mask, grouping):
        wanted = max(1, round(ratio * len(group)))
        for rank in expected_ranks(selection, len(group), wanted):
            chosen[group[rank]] = True
    assert torch.equal(select_tokens(mask, ratio, selection, grouping=grouping), chosen)


@pytest.mark.parametrize("grouping", ["image", "sample"])
@pytest.mark.parametrize("selection", [name for name in SELECTIONS if name != "all"])
@pytest.mark.parametrize("ratio", [0.001, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS.keys())
def test_every_group_gives_its_share(rows, ratio, selection, grouping):
    mask = mask_of(rows)
    chosen = select_tokens(mask, ratio, selection, seed=3, grouping=grouping)
    assert not (chosen & ~mask).any()
    for group in groups(mask, grouping):
        assert sum(bool(chosen[position]) for position in group) == max(1, round(ratio * len(group)))


@pytest.mark.parametrize("wanted", range(1, 17))
def test_uniform_is_evenly_spread_and_centred(wanted):
    mask = torch.ones(1, 16, dtype=torch.bool)
    ranks = select_tokens(mask, wanted / 16, "uniform").nonzero()[:, 1].tolist()
    gaps = [b - a for a, b in itertools.pairwise(ranks)]
    assert len(ranks) == wanted
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert abs(ranks[0] - (15 - ranks[-1])) <= 1


def test_the_published_nine_are_four_and_five():
    mask = torch.ones(1, 729, dtype=torch.bool)
    ranks = select_tokens(mask, 9 / 729, "ends").nonzero()[:, 1].tolist()
    assert ranks == [0, 1, 2, 3, 724, 725, 726, 727, 728]


def test_random_depends_on_the_seed_and_not_on_place_or_batch():
    long = torch.ones(1, 100, dtype=torch.bool)
    first = select_tokens(long, 0.2, "random", seed=0)
    assert torch.equal(first, select_tokens(long, 0.2, "random", seed=0))
    assert not torch.equal(first, select_tokens(long, 0.2, "random", seed=1))
    shifted = torch.cat([torch.zeros(2, 7, dtype=torch.bool), long.repeat(2, 1)], dim=1)
    assert torch.equal(select_tokens(shifted, 0.2, "random", seed=0)[:, 7:], first.repeat(2, 1))


def test_random_reaches_every_token():
    mask = torch.ones(1, 20, dtype=torch.bool)
    total = sum(select_tokens(mask, 0.1, "random", seed=seed).long() for seed in range(400))
    assert int(total.min()) > 10 and int(total.max()) < 90  # 40 expected


@pytest.mark.parametrize("first, last", [(2, 0), (0, 3), (2, 3), (50, 50)])
@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS.keys())
def test_positions_equal_a_loop_over_rows(rows, first, last):
    mask = mask_of(rows)
    expected = torch.zeros_like(mask)
    for row, tokens in enumerate(mask.tolist()):
        places = [i for i, x in enumerate(tokens) if x]
        for token in places[:first] + (places[-last:] if last else []):
            expected[row, token] = True
    assert torch.equal(select_positions(mask, first, last), expected)


@pytest.mark.parametrize("text, numbers", [("f7+l7", (7, 7)), ("f1", (1, 0)), ("l12", (0, 12))])
def test_notation(text, numbers):
    assert parse_positions(text) == numbers


@pytest.mark.parametrize("text", ["", "f0", "7", "f7+", "l7+f7", "first"])
def test_other_notations_are_refused(text):
    with pytest.raises(ValueError, match="f7"):
        parse_positions(text)
