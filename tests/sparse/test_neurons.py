"""Base layers seen as neurons."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.pytorch_utils import Conv1D

from peft_ext.sparse.bases.neurons import is_plain, is_supported, neuron_view, values_dtype_of

from ._inputs import random_linear


KINDS = pytest.mark.parametrize("kind", ["linear", "conv1d"])


@KINDS
def test_a_row_of_the_view_is_what_one_output_reads(kind):
    layer = random_linear(5, 3, kind)
    view = neuron_view(layer, layer.weight)
    assert view.shape == (3, 5)
    for neuron in range(3):
        x = torch.zeros(5)
        x[2] = 1.0
        assert torch.allclose((layer(x) - layer.bias)[neuron], view[neuron, 2])


@KINDS
def test_the_view_shares_memory_with_the_weight(kind):
    layer = random_linear(5, 3, kind)
    neuron_view(layer, layer.weight)[2, 4] = 7.0
    assert layer.weight[(4, 2) if kind == "conv1d" else (2, 4)] == 7.0


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(2, 3), True),
        (Conv1D(3, 2), True),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(2, 3), True),
        (nn.Conv1d(2, 3, 1), True),
        (nn.Conv3d(2, 4, 1, groups=2), True),
        (nn.MultiheadAttention(4, 2), True),
        (nn.ConvTranspose2d(2, 3, 1), False),
        (WeightStandardizedConv2d(2, 3, 1), False),
        (nn.Embedding(2, 3), False),
        (nn.Bilinear(2, 2, 3), False),
        (nn.LayerNorm(3), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_supported_types(layer, expected):
    assert is_supported(layer, None) == expected


@KINDS
def test_a_frozen_layer_is_plain_and_a_trained_one_is_not(kind):
    layer = random_linear(5, 3, kind)
    assert is_plain(layer)
    layer.bias.requires_grad_(True)
    assert is_plain(layer)
    layer.weight.requires_grad_(True)
    assert not is_plain(layer)


class _Subclass(nn.Linear):
    pass


class _TensorSubclass(torch.Tensor):
    pass


def test_what_computes_more_than_w_x_plus_b_is_not_plain():
    def frozen(cls=nn.Linear):
        return cls(5, 3).requires_grad_(False)

    assert not is_plain(frozen(_Subclass))
    assert not is_plain(parametrizations.weight_norm(nn.Linear(5, 3)).requires_grad_(False))
    replaced = frozen()
    replaced.forward = lambda x: x
    assert not is_plain(replaced)
    other_tensor = frozen()
    other_tensor.weight = nn.Parameter(torch.zeros(3, 5).as_subclass(_TensorSubclass), requires_grad=False)
    assert not is_plain(other_tensor)


@pytest.mark.parametrize("hook", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
@KINDS
def test_a_hooked_layer_is_plain_again_without_the_hook(kind, hook):
    layer = random_linear(5, 3, kind)
    handle = getattr(layer, f"register_{hook}")(lambda *args: None)
    assert not is_plain(layer)
    handle.remove()
    assert is_plain(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_take_the_dtype_of_the_base_or_what_a_packed_weight_computes_in(dtype):
    layer = random_linear(5, 3, dtype=dtype)
    assert values_dtype_of(layer) == dtype
    layer.weight = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    assert values_dtype_of(layer) == torch.float32
    layer.compute_dtype = torch.bfloat16
    assert values_dtype_of(layer) == torch.bfloat16
