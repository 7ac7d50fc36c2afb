"""Directions of two fixed Jacobians that independent float64 solutions and other libraries agree on."""

import pytest
import torch

from peft_ext.mtl import aggregate
from tests.mtl._jacobians import J3, J4, assert_close


CASES = [
    ("joint", {}, J3, [1, 1, 1]),
    ("joint", {"reduction": "reference"}, J3, [2, 2, 2]),
    ("pcgrad", {"reduction": "reference"}, J3, [0.58479500, 3.80116963, 3.80116963]),
    ("pcgrad", {}, J3, [0.29239750, 1.90058482, 1.90058482]),
    ("cagrad", {"c": 0.4}, J3, [0.34680274, 1.16329932, 1.16329932]),
    ("cagrad", {"c": 0.4}, J4, [0.4893323, 0.6022136, 0.7354225, -0.1592157]),
    ("cagrad", {"c": 0.4, "reduction": "reference"}, J3, [2 * 0.29896787, 2 * 1.00284421, 2 * 1.00284421]),
    ("mgda", {}, J3, [0, 1, 1]),
    ("mgda", {}, J4, [0.3680501, 0.4529542, 0.5531443, -0.1197529]),
    ("imtl_g", {}, J3, [0.07669683, 1, 1]),
    ("imtl_g", {}, J4, [0.37056322, 0.43117097, 0.56597943, -0.13513598]),
    ("nash_mtl", {"max_norm": 0}, J3, [0.07658429, 0.99853264, 0.99853264]),
    ("nash_mtl", {"max_norm": 0}, J4, [0.82339358, 0.99431032, 1.12530434, -0.25896001]),
    ("nash_mtl", {"max_norm": 1}, J3, [0.05415327, 0.70606920, 0.70606920]),
    ("nash_mtl", {}, J4, [0.47538651, 0.57406534, 0.64969472, -0.14951061]),
]
TORCHJD_CASES = [
    ("upgrad", {}, [0.29290152, 1.90035224, 1.90035224]),
    ("aligned_mtl", {}, [0.21327853, 0.96733296, 0.96733296]),
    ("config", {}, [0.15880898, 2.07060671, 2.07060671]),
    ("dualproj", {}, [0.55631566, 1.11092114, 1.11092114]),
    ("fairgrad", {"alpha": 2.0}, [0.03127372, 0.79081714, 0.79081714]),
]
# Every outcome of one task's projections, by the order in which it meets the other two.
PCGRAD_ROWS = [
    [[1.17011494, 1.84827586, -0.3954023, 0.19655172], [0.73793103, 2.04137931, -0.24827586, 0.58275862]],
    [[0.01172414, 0.54413793, 1.82896552, -0.03172414], [0.0337931, 0.80896552, 1.70758621, 0.11172414]],
    [[1.12, -0.24, 1.49, -1.18], [1.41333333, 0.16, 1.17, -1.12666667]],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("method", "options", "jacobian", "expected"), CASES, ids=[f"{c[0]}-{c[1]}-{len(c[2])}" for c in CASES]
)
def test_direction_is_the_published_one(method, options, jacobian, expected, dtype):
    direction = aggregate(jacobian.to(dtype), method=method, **options)
    assert direction.dtype == dtype
    assert_close(direction, expected)


@pytest.mark.parametrize(("method", "options", "expected"), TORCHJD_CASES, ids=[c[0] for c in TORCHJD_CASES])
def test_torchjd_gives_its_own_values(method, options, expected):
    pytest.importorskip("torchjd")
    pytest.importorskip({"fairgrad": "scipy"}.get(method, "quadprog"))
    assert_close(aggregate(J3, method=method, **options), expected)


def test_pcgrad_reaches_every_order_of_projection_and_nothing_else():
    outcomes = {
        (i, j, k): sum(torch.tensor(PCGRAD_ROWS[task][choice]) for task, choice in enumerate((i, j, k)))
        for i in range(2)
        for j in range(2)
        for k in range(2)
    }
    seen = set()
    for seed in range(100):
        direction = aggregate(J4, method="pcgrad", reduction="reference", seed=seed)
        nearest = min(outcomes, key=lambda key: float((outcomes[key] - direction).abs().max()))
        assert_close(direction, outcomes[nearest])
        seen.add(nearest)
    assert len(seen) == 8


def test_graddrop_keeps_one_sign_per_coordinate_and_averages_to_the_sum():
    copies = J4.double().repeat(1, 4000)  # every coordinate is drawn on its own
    draws = aggregate(copies, method="graddrop", reduction="reference").reshape(4000, 4)
    either = torch.stack([J4.clamp(min=0).sum(0), J4.clamp(max=0).sum(0)]).double()
    assert bool(((draws[:, None] - either).abs().min(dim=1).values < 1e-6).all())
    error = draws.std(dim=0) / len(draws) ** 0.5
    assert bool(((draws.mean(0) - J4.sum(0)).abs() < 5 * error).all())
