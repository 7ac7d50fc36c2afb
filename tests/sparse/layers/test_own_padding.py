"""Convolutions whose class pads in its own forward: adapted where that is all it does, refused where it does more."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from peft_ext import NeuroAdaConfig
from peft_ext.sparse.layers import SparseConv
from peft_ext.sparse.ops import BACKENDS

from .._asserts import TOLERANCES, assert_all_close, bits
from .._inputs import adapt


class DynamicSame(nn.Conv2d):
    """As timm's `Conv2dSame`: by the size of the input."""

    def forward(self, x):
        zeros = []
        for n, k, stride, dilation in zip(x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True):
            total = max((-(n // -stride) - 1) * stride + (k - 1) * dilation + 1 - n, 0)
            zeros = [total // 2, total - total // 2, *zeros]
        return F.conv2d(F.pad(x, zeros), self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class StaticSame(nn.Conv2d):
    """As EfficientNet-Lite's `Conv2dStaticSamePadding`: by a module, for the size of image that it was made for."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x):
        return F.conv2d(self.static_padding(x), self.weight, self.bias, self.stride, self.padding, self.dilation)


class InConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(F.pad(x, (0, 1, 2, 1)), weight, bias)


class Causal(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


PADDED = {
    "dynamic": (lambda: DynamicSame(4, 6, (3, 5), stride=2), (4, 9, 12)),
    "dynamic, dilated, grouped": (lambda: DynamicSame(4, 6, 3, stride=(1, 3), dilation=2, groups=2), (4, 11, 10)),
    "static": (lambda: StaticSame(4, 6, 3, stride=2), (4, 8, 8)),
    "static and padded": (lambda: StaticSame(4, 6, 3, padding=(1, 2)), (4, 7, 8)),
    "in _conv_forward": (lambda: InConvForward(4, 6, 3, bias=False), (4, 5, 6)),
    "causal": (lambda: Causal(4, 6, 3, dilation=2), (4, 11)),
}


@pytest.fixture(params=PADDED)
def case(request):
    build, size = PADDED[request.param]
    torch.manual_seed(0)
    return build().double(), torch.randn(3, *size, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients_are_those_of_the_class_with_the_sum_of_both_weights(case, backend):
    base, x = case
    layer = adapt(base, backend=backend)
    y = layer(x)
    weight = (base.weight + layer.get_delta_weight("default")).detach().requires_grad_()
    expected = torch.func.functional_call(base, {"weight": weight}, (x,))
    grad = torch.randn_like(expected)
    through = torch.autograd.grad(expected, [x, weight], grad)
    delta = layer.deltas["default"]
    wanted = {"output": expected.detach(), "x": through[0], "values": delta.support.gather(through[1].flatten(1))}
    results = dict(zip(("x", "values"), torch.autograd.grad(y, [x, delta.weight], grad), strict=True))
    assert_all_close({"output": y.detach(), **results}, wanted, TOLERANCES[torch.float64])


def test_merged_copied_and_compiled_layers_compute_the_same(case):
    base, x = case
    layer = adapt(base)
    expected, before = layer(x).detach(), bits(base.weight)
    torch.testing.assert_close(copy.deepcopy(layer)(x).detach(), expected, rtol=0, atol=0)
    torch.testing.assert_close(layer(x[0]).detach(), expected[0])
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x).detach(), expected)
    layer.merge()
    torch.testing.assert_close(layer(x).detach(), expected)
    layer.unmerge()
    assert torch.equal(bits(base.weight), before)


class _Does(nn.Conv2d):
    """A forward that does more than to add zeros."""

    def __init__(self, what):
        super().__init__(2, 4, 3)
        self.what, self.dropout = what, nn.Dropout(0.5)

    def forward(self, x):
        return self.what(self, x, super().forward)


MORE = {
    "standardises the weight": lambda self, x, conv: self._conv_forward(
        x, self.weight - self.weight.mean(), self.bias
    ),
    "reflects": lambda self, x, conv: conv(F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "pads with ones": lambda self, x, conv: conv(F.pad(x, (1, 1, 1, 1), value=1.0)),
    "scales": lambda self, x, conv: conv(2 * F.pad(x, (1, 1, 1, 1))),
    "rounds": lambda self, x, conv: conv(x.round()),
    "clips": lambda self, x, conv: conv(x.clamp(-4, 4)),
    "drops in training": lambda self, x, conv: conv(self.dropout(x)),
    "crops its output": lambda self, x, conv: conv(F.pad(x, (1, 1, 1, 1)))[..., 1:],
    "activates": lambda self, x, conv: F.silu(conv(x)),
    "adds the input": lambda self, x, conv: conv(x) + x.mean(),
    "convolves twice": lambda self, x, conv: conv(x) + conv(x),
    "leaves the bias out": lambda self, x, conv: self._conv_forward(x, self.weight, None),
    "pads by size": lambda self, x, conv: conv(F.pad(x, (0, x.shape[-1] % 3, 0, 0))),
    "is for one size": lambda self, x, conv: conv(F.pad(x, (0, 7 - x.shape[-1], 0, 7 - x.shape[-2]))),
    "takes pairs": lambda self, x, conv: conv(x[0] + x[1]),
}


@pytest.mark.parametrize("what", MORE)
def test_a_forward_that_does_more_is_refused(what):
    model = nn.Sequential(_Does(MORE[what]))
    with pytest.raises(TypeError, match=r"'0'.*_Does"):
        get_peft_model(model, NeuroAdaConfig(target_modules=["0"]))
    assert type(model[0]) is _Does


def test_trying_out_leaves_no_trace():
    torch.manual_seed(0)
    layer = _Does(lambda self, x, conv: conv(F.pad(self.dropout(x), (1, 1, 1, 1)))).eval()
    state = torch.random.get_rng_state()
    with pytest.raises(TypeError):
        get_peft_model(nn.Sequential(layer), NeuroAdaConfig(target_modules=["0"]))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not layer.training
    model = get_peft_model(nn.Sequential(DynamicSame(2, 4, 3)), NeuroAdaConfig(target_modules=["0"]))
    assert isinstance(model.base_model.model[0], SparseConv)
