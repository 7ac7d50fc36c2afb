"""Which path a layer takes: what the user asks for where it can be done, else the bypass."""

import pytest
import torch

from peft_ext.sparse.ops import BACKENDS, choose_backend, choose_conv_backend
from peft_ext.sparse.ops.crossovers import EVEN, GPU, MIN_DENSE_SHARE, UNEVEN, Costs, EntryCosts, Shares, fastest_path


def _choose(requested="auto", dtype=torch.float32, x_dtype=None, entries=64, rows=64, fan_in=100, **options):
    x, weight = torch.zeros(3, fan_in, dtype=x_dtype or dtype), torch.zeros(rows, fan_in, dtype=dtype)
    return choose_backend(requested, x, weight, entries, rows, **options)


@pytest.mark.parametrize("requested", ["bypass", "folded", "dense", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_request_is_honoured(requested, dtype):
    assert _choose(requested, dtype) == requested


@pytest.mark.parametrize("requested", BACKENDS)
def test_the_bypass_is_taken_where_nothing_else_can_be(requested):
    """Without a weight to read, for an empty support, where x has another dtype, and under autocast."""
    assert choose_backend(requested, torch.zeros(3, 100), None, 64, 64) == "bypass"
    assert _choose(requested, entries=0) == "bypass"
    assert _choose(requested, torch.bfloat16, x_dtype=torch.float32) == "bypass"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _choose(requested) == "bypass"


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, "folded"), (torch.bfloat16, "bypass")], ids=str)
def test_auto_folds_only_where_the_values_are_not_rounded_to_16_bits(dtype, expected):
    assert _choose(dtype=dtype) == expected


def test_auto_leaves_the_weight_alone_without_gradients():
    with torch.no_grad():
        assert _choose() == "bypass"


def test_auto_copies_small_weights_of_convolutions_only_and_only_without_gradients():
    def choose(channels=8, dtype=torch.float32, device="cpu", requested="auto"):
        weight = torch.empty(channels, channels, 1, dtype=dtype, device=device)
        return choose_conv_backend(requested, torch.empty(1, channels, 1, dtype=dtype), weight, channels)

    with torch.no_grad():
        assert choose() == choose(1024) == choose(dtype=torch.float64) == "copied"
        assert choose(1025) == choose(dtype=torch.bfloat16) == choose(device="meta") == "bypass"
        assert choose(requested="folded") == "folded"
        assert torch.vmap(lambda _: torch.tensor(choose() == "reference"))(torch.zeros(2)).all()
    assert choose(1024) == "folded"


@pytest.mark.parametrize("is_even", [True, False])
@pytest.mark.parametrize("tokens", [1, 16, 1000])
def test_auto_takes_the_path_of_the_least_measured_cost(is_even, tokens):
    rows, fan_in = 2048, 1024
    x, weight = torch.zeros(tokens, fan_in), torch.zeros(rows, fan_in)
    chosen = [choose_backend("auto", x, weight, rows * k, rows, is_even) for k in range(1, fan_in + 1)]
    expected = [fastest_path("cpu", is_even, rows * k, rows, fan_in, tokens) for k in range(1, fan_in + 1)]
    assert chosen == expected
    assert chosen[0] == "folded"
    assert tokens == 1 or chosen[-1] == "dense"
    dense = [path == "dense" for path in chosen]
    assert dense == sorted(dense)  # from one k on


@pytest.mark.parametrize("costs", [EVEN, UNEVEN, GPU], ids=["even", "uneven", "GPU"])
@pytest.mark.parametrize("tokens", [1, 10**6])
def test_few_trained_weights_never_go_dense(costs, tokens):
    for width in (10, 10**2, 10**4):
        assert costs.fastest(int(MIN_DENSE_SHARE * width**2), width, width, tokens) != "dense"


def test_costs_decide_by_their_sum():
    costs = Costs(
        folded_few=EntryCosts(call=100, entry=10, entry_token=1, feature_token=0),
        folded=EntryCosts(call=100, entry=15, entry_token=1, feature_token=2),
        bypass=EntryCosts(call=320, entry=0, entry_token=1, feature_token=1),
        weight=1,
        weight_token=0.5,
    )
    # 10 x 10 weights. 5 tokens: dense 350; folded 340 of 16 entries, 355 of 17; bypass 500 and more.
    assert [costs.fastest(entries, 10, 10, 5) for entries in (16, 17)] == ["folded", "dense"]
    # 10 tokens: dense 600; folded 500 and 25 per entry; bypass 520 and 10 per entry.
    assert [costs.fastest(entries, 10, 10, 10) for entries in (1, 2, 7, 9)] == ["folded", "bypass", "bypass", "dense"]
    shares = Shares(0.02, 0.1, 6)
    for tokens, between in ((6, "folded"), (5, "bypass")):
        found = [shares.fastest(entries, 10, 10, tokens) for entries in (2, 3, 10, 11)]
        assert found == ["bypass", between, between, "dense"]
