"""`torch.func.vmap` over tasks: gradients task by task equal those of a loop."""

import pytest
import torch
from torch import nn

from peft_ext.sparse.ops.bypass import bypass, sparse_grad_input, sparse_grad_values

from .._inputs import SHAPES, adapt, make_inputs, random_linear
from ._paths import PATHS


TASKS = 3


def _tasks(shape):
    drawn = [make_inputs(SHAPES[shape], torch.float64, seed=seed) for seed in range(TASKS)]
    return drawn[0], torch.stack([d.x.detach() for d in drawn]), torch.stack([d.values.detach() for d in drawn])


@pytest.mark.parametrize("batched", ["x", "values", "x and values"])
@pytest.mark.parametrize("shape", ["k1", "k2", "ragged", "k2 3-D"])
def test_gradients_per_task_are_those_of_a_loop(shape, batched):
    inputs, xs, several_values = _tasks(shape)

    def loss(values, x):
        out = PATHS["bypass"](x, inputs.weight, inputs.bias, values, inputs.support)
        return (out * inputs.grad).square().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1))
    values = several_values if "values" in batched else several_values[0]
    x = xs if "x" in batched else xs[0]
    in_dims = (0 if "values" in batched else None, 0 if "x" in batched else None)
    found = torch.func.vmap(gradient, in_dims)(values, x)
    for task in range(TASKS):
        alone = gradient(values[task] if in_dims[0] == 0 else values, x[task] if in_dims[1] == 0 else x)
        for mine, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(mine[task], expected)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_any_dimension_may_be_the_batch(dim):
    inputs, xs, _ = _tasks("k2")
    support, values = inputs.support, inputs.values.detach()
    moved = xs.movedim(0, dim)
    tables = (support.indices, None, *support.transposed())
    for product in (
        lambda x: bypass(inputs.grad, x, values, *tables),
        lambda x: sparse_grad_values(inputs.grad, x, *tables, None, []),
    ):
        found = torch.func.vmap(product, dim)(moved)
        for task in range(TASKS):
            torch.testing.assert_close(found[task], product(xs[task]))


def test_activations_that_share_values_are_one_product():
    inputs = _tasks("k2")[0]
    values, arguments = inputs.values.detach(), (inputs.support.indices, None, *inputs.support.transposed())

    def product(grad):
        return sparse_grad_input(grad, (9,), torch.float64, values, *arguments, None, [])

    def bags(work):
        with torch.profiler.profile() as profiler:
            work()
        return sum("embedding_bag" in event.name for event in profiler.events())

    several = torch.stack([inputs.grad] * TASKS)
    assert bags(lambda: torch.func.vmap(product)(several)) == bags(lambda: product(inputs.grad)) > 0


BASES = {
    "linear": (lambda: random_linear(9, 6), (5, 9)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("backend", ["auto", "bypass", "folded", "dense"])
@pytest.mark.parametrize("base", BASES)
def test_layers_give_gradients_per_task(base, backend):
    make, shape = BASES[base]
    layer = adapt(make().requires_grad_(False), k=2, backend=backend)
    name = "neuroada_delta.default.weight"
    values, frozen = dict(layer.named_parameters())[name].detach(), dict(layer.named_buffers())
    xs = torch.randn(TASKS, *shape)

    def loss(values, x):
        return torch.func.functional_call(layer, {name: values, **frozen}, (x,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, xs)
    for task in range(TASKS):
        (alone,) = torch.autograd.grad(layer(xs[task]).square().sum(), [layer.deltas["default"].weight])
        torch.testing.assert_close(found[task], alone)


@pytest.mark.parametrize("shape", ["k1", "k2", "ragged"])
def test_second_derivatives_per_task_are_those_of_a_loop(shape):
    inputs, xs, several_values = _tasks(shape)

    def penalty_by(path):
        def loss(values, x):
            return PATHS[path](x, inputs.weight, inputs.bias, values, inputs.support).tanh().sum()

        def penalty(values, x):
            gradients = torch.func.grad(loss, argnums=(0, 1))(values, x)
            return sum(gradient.square().sum() for gradient in gradients)

        return torch.func.grad(penalty, argnums=(0, 1))

    found = torch.func.vmap(penalty_by("bypass"))(several_values, xs)
    for task in range(TASKS):
        alone = penalty_by("reference")(several_values[task], xs[task])
        for mine, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(mine[task], expected)
