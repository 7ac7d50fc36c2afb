"""The paths of convolutions agree with dense ones: output and each gradient; their ops behave."""

import pytest
import torch
import torch.nn.functional as F

from peft_ext.sparse.ops import ConvGeometry, bypass_conv, conv, folded_conv
from peft_ext.sparse.ops.conv import entries_by_tap, pad
from peft_ext.sparse.ops.folded_conv import reference_conv

from .._asserts import TOLERANCES, assert_all_close, assert_same_bits, bits, dense_update
from .._convs import CONVS, ConvCase, dense_conv
from .._inputs import random_support


DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]
# k of a table, or the share of a ragged support's entries that each row has.
SUPPORTS = {"k1": 1, "k3": 3, "ragged": (0, 2, 1, 0, 4, 1, 0, 3)}


def _support(layer, form="k3"):
    rows, fan_in = layer.weight.shape[0], layer.weight[0].numel()
    entries = SUPPORTS[form]
    if isinstance(entries, int):
        entries = min(entries, fan_in)
    else:
        entries = [min(count, fan_in) for count in entries[:rows]]
    return random_support(rows, fan_in, entries, torch.Generator().manual_seed(2))


def _values(support, dtype):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(support.indices.shape, generator=generator).to(dtype).requires_grad_()


def _bypass(layer, x, values, support):
    geometry = ConvGeometry.of(layer)
    tables = entries_by_tap(support.indices, geometry.taps)
    return bypass_conv(layer(x), pad(layer, x), values, support.indices, support.offsets, *tables, geometry)


def _folded(layer, x, values, support, dense_gradient=False):
    geometry = ConvGeometry.of(layer)
    tables = entries_by_tap(support.indices, geometry.taps)
    arguments = (layer.weight, layer.bias, values, support.indices, support.offsets, *tables, geometry)
    return folded_conv(pad(layer, x), *arguments, dense_gradient)


def _dense(layer, x, values, support):
    return _folded(layer, x, values, support, dense_gradient=True)


def _reference(layer, x, values, support):
    geometry = ConvGeometry.of(layer)
    return reference_conv(
        pad(layer, x), layer.weight, layer.bias, values, support.indices, support.offsets, geometry
    )


PATHS = {"bypass": _bypass, "folded": _folded, "dense": _dense, "reference": _reference}
EVERY_PATH = pytest.mark.parametrize("path", PATHS)


def _results(path, layer, x, values, support, grad):
    y = PATHS[path](layer, x, values, support)
    gradients = torch.autograd.grad(y, [x, values], grad)
    return {"output": y.detach(), "gradient of x": gradients[0], "gradient of values": gradients[1]}


def _expected(layer, x, values, support, grad):
    """By torch's convolution of dense fp64 tensors."""
    wide = layer.to(torch.float64, copy=True) if False else _widened(layer)
    x, values = x.detach().double().requires_grad_(), values.detach().double().requires_grad_()
    weight = wide.weight + dense_update(values, support).view(wide.weight.shape)
    y = dense_conv(wide, x, weight)
    gradients = torch.autograd.grad(y, [x, values], grad.double())
    return {"output": y.detach(), "gradient of x": gradients[0], "gradient of values": gradients[1]}
