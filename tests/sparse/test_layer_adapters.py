"""How a layer takes an adapter: its options, the base it belongs to, a compiled forward."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from peft_ext import NeuroAdaConfig
from peft_ext.sparse.bases.neurons import is_plain, values_dtype_of
from peft_ext.sparse.support import Support
from peft_ext.tuners.neuroada import NeuroAdaLinear
from tests._models.layers import KINDS as LAYERS

from ._asserts import assert_same_bits, bits
from ._inputs import adapt, random_linear, random_support


FAN_IN, ROWS = 9, 6
KINDS = pytest.mark.parametrize("kind", ["linear", "conv1d"])


def _config(**options):
    return NeuroAdaConfig(target_modules=["unused"], **options)


def _support(seed=0):
    return random_support(ROWS, FAN_IN, 2, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("values_dtype", [None, "float32", "bfloat16", "float16"])
def test_values_have_the_dtype_that_was_asked_for_or_that_of_the_base(base_dtype, values_dtype):
    layer = NeuroAdaLinear(random_linear(FAN_IN, ROWS, dtype=base_dtype))
    layer.update_layer("default", _config(values_dtype=values_dtype), _support())
    expected = base_dtype if values_dtype is None else getattr(torch, values_dtype)
    assert layer.deltas["default"].weight.dtype == expected
    assert layer.deltas["default"].indices.dtype == torch.int32


def test_values_of_a_packed_weight_have_the_dtype_that_it_computes_in():
    layer = random_linear(FAN_IN, ROWS)
    layer.weight = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    assert values_dtype_of(layer) == torch.float32
    layer.compute_dtype = torch.bfloat16
    assert values_dtype_of(layer) == torch.bfloat16


class _Subclass(nn.Linear):
    pass


class _TensorSubclass(torch.Tensor):
    pass


def test_what_computes_more_than_w_x_plus_b_is_not_plain():
    def frozen(cls=nn.Linear):
        return cls(5, 3).requires_grad_(False)

    assert is_plain(frozen()) and not is_plain(frozen(_Subclass))
    assert not is_plain(parametrizations.weight_norm(nn.Linear(5, 3)).requires_grad_(False))
    replaced = frozen()
    replaced.forward = lambda x: x
    assert not is_plain(replaced)
    other_tensor = frozen()
    other_tensor.weight = nn.Parameter(torch.zeros(3, 5).as_subclass(_TensorSubclass), requires_grad=False)
    assert not is_plain(other_tensor)


@pytest.mark.parametrize("init_weights", [True, False])
def test_values_start_at_zero_unless_asked_otherwise(init_weights):
    layer = NeuroAdaLinear(random_linear(FAN_IN, ROWS))
    layer.update_layer("default", _config(init_weights=init_weights), _support())
    zeros = layer.deltas["default"].weight == 0
    assert bool(zeros.all()) if init_weights else not bool(zeros.any())


@KINDS
def test_the_fingerprint_is_that_of_the_base(kind):
    layer = adapt(random_linear(FAN_IN, ROWS, kind))
    delta = layer.deltas["default"]
    assert torch.equal(delta.fingerprint, delta.support.fingerprint(layer.base_matrix()))
    assert delta.fingerprint.any()


def _with_loaded_support(layer):
    """As after loading a checkpoint: the support was set anew."""
    delta = layer.deltas["default"]
    delta.load_state_dict(delta.state_dict())
    assert not delta.checked
    return layer


def test_a_loaded_adapter_is_compared_with_the_base_once():
    layer = _with_loaded_support(adapt(random_linear(FAN_IN, ROWS)))
    x = torch.randn(3, FAN_IN)
    layer(x)
    assert layer.deltas["default"].checked
    layer.base_layer.weight.data.add_(1)
    layer(x)  # a base that is changed later is the user's business


@pytest.mark.parametrize("use", ["forward", "mixed batch", "merge", "get_delta_weight"])
@KINDS
def test_a_loaded_adapter_of_another_base_is_refused_on_first_use(kind, use):
    layer = _with_loaded_support(adapt(random_linear(FAN_IN, ROWS, kind)))
    layer.base_layer.weight.data.copy_(random_linear(FAN_IN, ROWS, kind, seed=1).weight)
    original = bits(layer.base_layer.weight)
    x = torch.randn(3, FAN_IN)
    run = {
        "forward": lambda: layer(x),
        "mixed batch": lambda: layer(x, adapter_names=["default"] * 3),
        "merge": layer.merge,
        "get_delta_weight": lambda: layer.get_delta_weight("default"),
    }[use]
    for _ in range(2):  # not only the first time
        with pytest.raises(ValueError, match="'default' was made for another base model: this 9->6 layer"):
            run()
    assert_same_bits(layer.base_layer.weight, original)


def test_a_pending_adapter_says_that_it_is_to_be_loaded():
    layer = NeuroAdaLinear(random_linear(FAN_IN, ROWS))
    placeholder = Support(torch.arange(2, dtype=torch.int32).repeat(ROWS, 1), FAN_IN)
    layer.update_layer("default", _config(), placeholder, pending=True)
    layer.set_adapter(["default"])
    x = torch.randn(3, FAN_IN)
    for run in (lambda: layer(x), layer.merge):
        with pytest.raises(RuntimeError, match="'default' are not known yet.* Load the checkpoint"):
            run()
    source = adapt(random_linear(FAN_IN, ROWS))
    layer.deltas["default"].load_state_dict(source.deltas["default"].state_dict())
    torch.testing.assert_close(layer(x), source(x))


@pytest.mark.parametrize("backend", ["bypass", "folded"])
@pytest.mark.parametrize("selection", ["random", "random_layer"])
def test_a_support_that_was_set_is_followed(selection, backend):
    """transformers' loader sets parameters and buffers one by one, without load_state_dict; uneven rows have two."""
    options = {"backend": backend, "selection": selection}
    layer = adapt(random_linear(FAN_IN, ROWS), **options)
    other = adapt(random_linear(FAN_IN, ROWS), adapters=("a", "default"), active=["default"], **options)
    mine, theirs = layer.deltas["default"], other.deltas["default"]
    layer(torch.randn(20, FAN_IN, requires_grad=True)).sum().backward()  # makes the tables
    assert not torch.equal(mine.indices, theirs.indices)
    for name, tensor in theirs.identity.items():
        setattr(mine, name, tensor.clone())
    mine.weight = nn.Parameter(theirs.weight.detach().clone())
    x = torch.randn(20, FAN_IN, requires_grad=True)
    outputs = [each(x) for each in (layer, other)]
    assert torch.equal(*outputs)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in outputs))


@pytest.mark.parametrize(
    ("kind", "backend"), [("Linear", "bypass"), ("Linear", "dense"), ("Conv1D", "folded"), ("dynamic", "auto")]
)
def test_a_compiled_layer_is_one_graph_and_gives_the_same(kind, backend):
    torch.compiler.reset()
    layer = adapt(LAYERS[kind].build(torch.float32), backend=backend)
    original = bits(layer.base_layer.weight)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    values = layer.deltas["default"].weight
    for samples in (3, 5):
        x = LAYERS[kind].draw(torch.float32, samples)
        expected, result = layer(x), compiled(x)
        torch.testing.assert_close(result, expected)
        gradients = [torch.autograd.grad(y.square().sum(), (x, values)) for y in (expected, result)]
        torch.testing.assert_close(*gradients)
    assert_same_bits(layer.base_layer.weight, original)


def test_repr_names_the_method_and_the_adapter():
    text = repr(adapt(random_linear(FAN_IN, ROWS)))
    assert text.startswith("neuroada.NeuroAdaLinear(")
    assert "(default): SparseDelta(values=6x2, fan_in=9)" in text
