"""The steering map: R stays orthonormal whatever happens to its parameters, values and gradients are the formula's."""

import pytest
import torch

from peft_ext.tuners.mores.steering import Steering, orthonormal
from tests.tuners.mores._common import gram_schmidt, steered


SIZES = [(8, 1), (16, 4), (6, 6), (200, 8), (513, 1)]


def away_from_orthonormal(factor):
    return float((factor.T @ factor - torch.eye(factor.shape[1], dtype=factor.dtype)).abs().max())


def filled(*args, seed=0, dtype=torch.float32, **kwargs):
    torch.manual_seed(seed)
    steering = Steering(*args, **kwargs).to(dtype)
    for parameter in steering.parameters():
        torch.nn.init.normal_(parameter)
    return steering


@pytest.mark.parametrize("size, rank", SIZES)
def test_orthonormal_equals_gram_schmidt(size, rank):
    raw = torch.randn(size, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthonormal(raw), gram_schmidt(raw))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size, rank", [*SIZES, (4096, 8)])
def test_orthonormal_in_every_dtype(size, rank, dtype):
    raw = torch.randn(size, rank, generator=torch.Generator().manual_seed(0)).to(dtype)
    factor = orthonormal(raw)
    assert factor.dtype == torch.float32
    assert away_from_orthonormal(factor) <= 1e-6


@pytest.mark.parametrize("size, rank", SIZES)
def test_the_scale_of_the_parameter_means_nothing(size, rank):
    raw = torch.randn(size, rank, generator=torch.Generator().manual_seed(0))
    expected = orthonormal(raw)
    for scale in (2.0**-60, 0.25, 2.0**60):
        assert torch.equal(orthonormal(raw * scale), expected)
    torch.testing.assert_close(orthonormal(raw * 0.9), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size, rank", [(8, 1), (16, 4)])
@pytest.mark.parametrize("options", [{}, {"tied": False}, {"with_bias": False}], ids=str)
def test_values_and_gradients_equal_the_formula(size, rank, options):
    steering = filled(size, rank, **options)
    parameters = {name: value.detach().clone().requires_grad_() for name, value in steering.named_parameters()}
    hidden = torch.randn(2, 5, size, requires_grad=True)
    other = hidden.detach().clone().requires_grad_()
    weights = torch.randn(2, 5, size)
    actual = hidden + steering(hidden)
    expected = steered(other, torch.ones(2, 5, dtype=torch.bool), parameters)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(hidden.grad, other.grad, atol=1e-5, rtol=1e-4)
    for name, value in steering.named_parameters():
        torch.testing.assert_close(value.grad, parameters[name].grad, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("options", [{}, {"tied": False}, {"with_bias": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_at_first_bit_for_bit(options, dtype):
    steering = Steering(32, 4, **options)
    assert not steering(torch.randn(3, 32).to(dtype)).any()


def test_random_start_disturbs():
    torch.manual_seed(0)
    steering = Steering(32, 4, init="random")
    assert steering(torch.randn(3, 32)).norm(dim=-1).min() > 0.1
    assert steering.bias.any() and steering.weight.abs().max() <= 32**-0.5


def test_identity_has_gradients_to_start_with():
    steering = Steering(32, 4)
    (steering(torch.randn(3, 32)) * torch.randn(3, 32)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in steering.parameters())


@pytest.mark.parametrize("optimiser", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("rank", [1, 4])
def test_orthonormal_after_five_hundred_steps_with_weight_decay(optimiser, rank):
    torch.manual_seed(0)
    steering = Steering(64, rank)
    target = filled(64, rank, seed=1)
    hidden = torch.randn(256, 64)
    wanted = target(hidden).detach()
    steps = optimiser(steering.parameters(), lr=0.01, weight_decay=0.1)
    start = orthonormal(steering.raw_up.detach())
    losses = []
    for _ in range(500):
        steps.zero_grad()
        loss = (steering(hidden) - wanted).pow(2).sum(-1).mean()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert away_from_orthonormal(steering.up().detach()) <= 1e-6
    assert (orthonormal(steering.raw_up.detach()) - start).abs().max() > 0.05  # it did turn
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("optimiser", [torch.optim.AdamW, torch.optim.SGD])
def test_weight_decay_alone_does_not_move_the_rotation(optimiser):
    steering = Steering(64, 3)
    before = steering.up().detach().clone()
    steps = optimiser(steering.parameters(), lr=1.0, weight_decay=0.1)
    for _ in range(50):
        steering(torch.zeros(1, 64)).sum().mul(0.0).backward()
        steps.step()
    torch.testing.assert_close(steering.up(), before, atol=1e-6, rtol=0)
    assert steering.raw_up.abs().max() < 0.1  # the parameter itself did shrink


def test_decay_without_end_does_not_underflow():
    torch.manual_seed(0)
    steering = Steering(64, 2, tied=False)
    before = steering.up().detach().clone()
    steps = torch.optim.AdamW(steering.parameters(), lr=1.0, weight_decay=0.9)
    for _ in range(300):  # 10⁻³⁰⁰ of its size, if nothing held it
        steering(torch.zeros(1, 64)).sum().mul(0.0).backward()
        steps.step()
        steps.zero_grad()
    torch.testing.assert_close(steering.up(), before, atol=1e-5, rtol=0)


def test_keeping_the_scale_leaves_every_bit_of_the_factor():
    steering = filled(64, 3)
    steering.raw_up.data *= 2.0**-30
    before = steering.up().detach().clone()
    steering.keep_scale()
    assert steering.raw_up.abs().max() > 2.0**-20
    assert torch.equal(steering.up(), before)


def test_scale_is_kept_between_a_forward_and_its_backward():
    """Two forwards, the scale changes, then both backwards: the gradients are those of the first scale."""
    steering = filled(16, 2)
    hidden = torch.randn(3, 16)
    loss = steering(hidden).pow(2).sum()
    expected = torch.autograd.grad(loss, steering.raw_up, retain_graph=True)[0]
    steering.raw_up.data *= 2.0**-30
    steering.keep_scale()
    torch.testing.assert_close(torch.autograd.grad(loss, steering.raw_up)[0], expected)


def test_dropout_acts_on_the_update_and_only_in_training():
    steering = filled(16, 2, dropout=0.5)
    hidden = torch.ones(50, 16)
    plain = steering.eval()(hidden)
    torch.testing.assert_close(steering.eval()(hidden), plain)
    dropped = steering.train()(hidden)
    kept = dropped != 0
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(dropped[kept], 2 * plain[kept])


def test_under_autocast_it_computes_in_fp32():
    steering = filled(64, 4).eval()
    hidden = torch.randn(5, 64)
    expected = steering(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        actual = steering(hidden)
    assert actual.dtype == torch.float32 and torch.equal(actual, expected)
