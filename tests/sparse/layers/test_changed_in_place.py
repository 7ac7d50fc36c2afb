"""Models that change a layer's output in place, as ConvBERT and the Mambas do."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_ext import NeuroAdaConfig
from peft_ext.sparse.ops import BACKENDS


LAYERS = {
    "linear": (lambda: nn.Linear(6, 6), (2, 5, 6)),
    "linear on rows": (lambda: nn.Linear(6, 6), (5, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 6, 3, padding=1), (2, 6, 5)),
    "conv1d by channel": (lambda: nn.Conv1d(6, 6, 3, padding=1, groups=6), (2, 6, 5)),
    "conv1d on one sample": (lambda: nn.Conv1d(6, 6, 3, padding=1), (6, 5)),
    "conv2d": (lambda: nn.Conv2d(6, 6, 3, padding=1), (2, 6, 5, 4)),
}


class InPlace(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.scale = nn.Parameter(torch.rand(()))

    def forward(self, x):
        y = self.layer(x)
        y += self.scale
        y[..., :2] *= 3
        return y.mul_(self.scale).relu_()


@pytest.mark.parametrize("train_bias", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_result_and_every_gradient_are_right(layer, backend, train_bias):
    make, shape = LAYERS[layer]
    base = InPlace(make())
    dense = copy.deepcopy(base)
    options = {"backend": backend, "train_bias": train_bias, "init_weights": False}
    model = get_peft_model(base, NeuroAdaConfig(k=2, target_modules=["layer"], **options))
    adapted = model.base_model.model.layer
    base.scale.requires_grad_(True)
    delta = adapted.deltas["default"]
    with torch.no_grad():
        dense.layer.weight += adapted.get_delta_weight("default")
        if train_bias:
            dense.layer.bias += delta.bias
    x = torch.randn(shape, requires_grad=True)
    expected_x = x.detach().clone().requires_grad_(True)
    result, expected = model(x), dense(expected_x)
    torch.testing.assert_close(result, expected)
    weights = torch.randn(result.shape)
    (result * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, expected_x.grad)
    torch.testing.assert_close(base.scale.grad, dense.scale.grad)
    torch.testing.assert_close(delta.weight.grad, delta.support.gather(dense.layer.weight.grad.flatten(1)))
    if train_bias:
        torch.testing.assert_close(delta.bias.grad, dense.layer.bias.grad)
