"""Convolutions whose class has its own forward: refused where it does more than to pad."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from peft_ext import NeuroAdaConfig
from peft_ext.sparse.layers import SparseConv
from tests._models.layers import DynamicSame


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
