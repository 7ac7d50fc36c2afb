"""What defines each method, over random gradients and twelve orders of magnitude."""

import io

import numpy as np
import pytest
import torch

from peft_ext.mtl import METHODS, aggregate, make_aggregator
from peft_ext.mtl.aggregators import OWN_METHODS, Step
from tests.mtl._jacobians import SCALES, assert_close, random_jacobian


SIZES = [(2, 3), (3, 50), (10, 400)]
HOMOGENEOUS = [
    "joint",
    "pcgrad",
    "cagrad",
    "mgda",
    "imtl_g",
    "graddrop",
    "upgrad",
    "aligned_mtl",
    "config",
    "dualproj",
]
OPTIONS = {
    "constant": lambda tasks: {"weights": [1.0] * tasks},
    "fairgrad": lambda tasks: {"alpha": 2.0},
    "krum": lambda tasks: {"n_byzantine": 0},
    "trimmed_mean": lambda tasks: {"trim_number": 1},
}


def direction(jacobian, method, **options):
    if method == "famo":
        options["losses"] = torch.linspace(1, 2, len(jacobian))
    if method in OPTIONS:
        options |= OPTIONS[method](len(jacobian))
    return aggregate(jacobian, method=method, **options)


def needs(method):
    if method not in OWN_METHODS:
        pytest.importorskip("torchjd")
    if method in ("upgrad", "dualproj"):
        pytest.importorskip("quadprog")
    if method == "fairgrad":
        pytest.importorskip("scipy")


@pytest.fixture(params=SIZES, ids=str)
def size(request):
    return request.param


@pytest.fixture(params=SCALES, ids=str)
def jacobian(request, size):
    return random_jacobian(*size, scale=request.param)


def test_imtl_g_has_equal_projections(jacobian):
    d = direction(jacobian, "imtl_g")
    projections = jacobian @ d / jacobian.norm(dim=1)
    assert_close(projections, projections.mean().expand(len(jacobian)), 1e-8)


def test_nash_solves_the_bargaining_game(jacobian):
    aggregator = make_aggregator("nash_mtl", len(jacobian), max_norm=0)
    gramian = (jacobian @ jacobian.T).numpy()
    alpha = aggregator.weights(Step(gramian, np.ones(len(jacobian), bool), np.full(len(jacobian), np.nan)))
    assert np.all(alpha > 0)
    np.testing.assert_allclose(alpha * (gramian @ alpha), 1, rtol=1e-7)
    assert_close(direction(jacobian, "nash_mtl", max_norm=0).norm(), torch.tensor(len(jacobian) ** 0.5), 1e-7)
    assert_close(direction(jacobian, "nash_mtl").norm(), torch.tensor(1.0), 1e-7)


@pytest.mark.parametrize("c", [0.1, 0.4, 0.9])
def test_cagrad_lies_on_the_ball_and_beats_every_other_point_of_it(jacobian, c):
    mean = jacobian.mean(0)
    d = direction(jacobian, "cagrad", c=c)
    assert_close((d - mean).norm(), c * mean.norm(), 1e-7)
    # The dual solution maximises the smallest product with a task's gradient (equation 3 of the paper).
    generator = torch.Generator().manual_seed(1)
    others = torch.randn(200, len(mean), generator=generator, dtype=torch.float64)
    spanned = torch.rand(200, len(jacobian), generator=generator, dtype=torch.float64) @ jacobian
    for u in (others, spanned):
        points = mean + c * mean.norm() * u / u.norm(dim=1, keepdim=True)
        best = (points @ jacobian.T).min(dim=1).values.max()
        assert best <= (jacobian @ d).min() + 1e-8 * mean.norm() ** 2


@pytest.mark.parametrize("size", [(2, 1), (10, 3), (10, 20)], ids=str)
@pytest.mark.parametrize("kind", ["many", "opposite", "twice"])
def test_cagrad_where_the_hull_holds_zero(size, kind):
    """There `g_w` may vanish, which its formula divides by: the direction stays the best of the ball."""
    for seed in range(4):
        jacobian = random_jacobian(*size, seed=seed)
        if kind != "many":
            jacobian[-1] = {"opposite": -2.0, "twice": 1.0}[kind] * jacobian[0]
        mean = jacobian.mean(0)
        d = direction(jacobian, "cagrad")
        generator = torch.Generator().manual_seed(1)
        spanned = torch.randn(300, size[0], generator=generator, dtype=torch.float64) @ jacobian
        spanned = torch.cat([spanned, mean[None], -mean[None]])
        points = mean + 0.4 * mean.norm() * spanned / spanned.norm(dim=1, keepdim=True)
        best = (points @ jacobian.T).min(dim=1).values.max()
        tolerance = 1e-7 * mean.norm() * jacobian.norm(dim=1).max()
        assert best <= (jacobian @ d).min() + tolerance
        assert (d - mean).norm() <= 0.4 * mean.norm() * (1 + 1e-7)


@pytest.mark.parametrize("tasks", [2, 5])
def test_gradients_of_very_unlike_norms(tasks):
    jacobian = random_jacobian(tasks, 20) * torch.logspace(-6, 6, tasks, dtype=torch.float64)[:, None]
    norms = jacobian.norm(dim=1)
    shortest = direction(jacobian, "mgda")
    assert bool((jacobian @ shortest >= shortest @ shortest - 1e-8 * norms * shortest.norm()).all())
    assert shortest.norm() <= norms.min() * (1 + 1e-9)
    mean = jacobian.mean(0)
    assert_close((direction(jacobian, "cagrad") - mean).norm(), 0.4 * mean.norm(), 1e-7)


def test_mgda_is_the_shortest_vector_of_the_hull(jacobian):
    d = direction(jacobian, "mgda")
    squared = d @ d
    assert bool((jacobian @ d >= squared - 1e-8 * (jacobian * jacobian).sum(1).max()).all())


def test_pcgrad_of_two_tasks_conflicts_with_neither(size):
    for seed in range(20):
        jacobian = random_jacobian(2, size[1], seed=seed)
        d = direction(jacobian, "pcgrad")
        assert bool((jacobian @ d >= -1e-9).all())


@pytest.mark.parametrize("method", HOMOGENEOUS)
@pytest.mark.parametrize("scale", [SCALES[0], SCALES[-1]], ids=str)
def test_scaling_the_gradients_scales_the_direction(method, scale, size):
    needs(method)
    jacobian = random_jacobian(*size)
    assert_close(direction(scale * jacobian, method) / scale, direction(jacobian, method), 1e-5)


@pytest.mark.parametrize(
    ("method", "factor"), [("joint", 1.0), ("pcgrad", 1.0), ("cagrad", 1.4), ("mgda", 1.0), ("imtl_g", 1.0)]
)
def test_identical_rows(method, factor):
    row = random_jacobian(1, 20)
    assert_close(direction(row.repeat(4, 1), method), factor * row[0], 1e-6)
    assert_close(direction(row.repeat(4, 1), "nash_mtl"), row[0] / row.norm(), 1e-6)


@pytest.mark.parametrize("method", OWN_METHODS)
def test_zero_rows_take_no_part(method):
    jacobian = random_jacobian(3, 30)
    with_zero = torch.cat([jacobian, torch.zeros(1, 30, dtype=torch.float64)])
    d = direction(with_zero, method)
    assert bool(d.isfinite().all())
    assert bool(d.any())
    if method in ("mgda", "imtl_g", "nash_mtl"):
        assert_close(d, direction(jacobian, method), 1e-8)
    if method == "joint":
        assert_close(d, with_zero.mean(0), 1e-12)  # the loss of that task is still one of the losses averaged


@pytest.mark.parametrize("method", METHODS)
def test_all_rows_zero_gives_zero(method):
    needs(method)
    assert not bool(direction(torch.zeros(3, 7), method).any())


@pytest.mark.parametrize("method", ["joint", "pcgrad", "mgda", "imtl_g", "nash_mtl", "cagrad"])
def test_opposite_gradients_cancel(method):
    row = random_jacobian(1, 20)
    d = direction(torch.cat([row, -row]), method)
    assert float(d.norm()) <= 1e-3 * float(row.norm())


@pytest.mark.parametrize("method", METHODS)
def test_global_random_stream_is_left_alone(method):
    needs(method)
    before = torch.get_rng_state()
    direction(random_jacobian(5, 30), method)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", METHODS)
def test_state_restores_every_later_direction_bit_for_bit(method):
    needs(method)
    options = OPTIONS.get(method, lambda tasks: {})(5)

    def steps(aggregator, first, last):
        for i in range(first, last):
            jacobian = random_jacobian(5, 40, seed=i)
            losses = np.linspace(1 + i, 2, 5)
            step = Step((jacobian @ jacobian.T).numpy(), np.ones(5, bool), losses)
            if aggregator.needs_rows:
                yield aggregator.combine(jacobian, step)
            else:
                yield torch.from_numpy(aggregator.weights(step))
            if aggregator.needs_feedback:
                aggregator.feedback(losses * np.linspace(0.8, 1.1, 5))

    first = make_aggregator(method, 5, **options)
    list(steps(first, 0, 3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)  # as a checkpoint does
    expected = list(steps(first, 3, 6))
    again = make_aggregator(method, 5, seed=9, **options)
    again.load_state_dict(state)
    for a, b in zip(steps(again, 3, 6), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", OWN_METHODS)
def test_half_precision_rows_are_solved_in_float64(method, dtype):
    jacobian = random_jacobian(3, 60).to(dtype)
    d = direction(jacobian, method)
    assert d.dtype == dtype
    assert_close(d, direction(jacobian.double(), method), 0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "nope"}, "method='nope'"),
        ({"method": "cagrad", "d": 0.4}, "no option 'd'"),
        ({"reduction": "sum"}, "reduction='sum'"),
        ({"jacobian": torch.full((3, 5), torch.nan)}, "not finite"),
        ({"jacobian": torch.zeros(5)}, "floating-point matrix"),
        ({"jacobian": [[1.0, 2.0]]}, "not a list"),
        ({"method": "famo"}, "needs the tasks' losses"),
        ({"method": "famo", "losses": [1.0, 1.0, 1.0], "num_tasks": 7}, "no option 'num_tasks'"),
        ({"method": "cagrad", "c": "x"}, r"method='cagrad' does not take the options \{'c': 'x'\}"),
        ({"method": "nash_mtl", "update_weights_every": 1.5}, "update_weights_every=1.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        aggregate(**{"jacobian": random_jacobian(3, 5), **options})


def test_constant_weights_keep_to_their_tasks_when_one_is_absent():
    jacobian = random_jacobian(3, 5)
    jacobian[1] = 0
    assert_close(aggregate(jacobian, "constant", weights=[1.0, 2.0, 3.0]), jacobian[0] + 3 * jacobian[2], 1e-12)


def test_methods_with_a_least_number_of_tasks_say_so():
    pytest.importorskip("torchjd")
    with pytest.raises(ValueError, match="Krum cannot combine the gradients of 2 tasks"):
        aggregate(random_jacobian(2, 5), "krum", n_byzantine=0)
