"""
Training, for every layer type: as masked training of dense weights; the base never moves, and whoever looks at it sees
the original.
"""

import copy
import io
import itertools
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_ext import NeuroAdaConfig
from peft_ext.sparse.bases.part import Part
from peft_ext.sparse.ops import BACKENDS
from tests._models.layers import KINDS
from tests._models.networks import NETWORKS, make_network
from tests.contract._common import layers_of

from .._asserts import bits
from .._inputs import adapt
from .._probes import tensors_of


EVERY_KIND = pytest.mark.parametrize("kind", NETWORKS)
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
SOME_KINDS_AND_BACKENDS = pytest.mark.parametrize(
    ("kind", "backend"),
    [*itertools.product(("Linear", "Conv1D", "Conv2d grouped"), BACKENDS), ("experts", "auto")],
)
# Every type with the backend that is chosen for it, and every backend with some types in 16 bits.
KINDS_AND_BACKENDS = [(kind, "auto", torch.float32) for kind in NETWORKS] + [
    (kind, backend, torch.bfloat16)
    for kind in ("Conv1D", "Conv2d grouped", "MultiheadAttention", "experts")
    for backend in (BACKENDS if kind != "experts" else ["auto"])
]
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


def _adapted(network, targets, backend="auto", selection="magnitude", **options):
    config = NeuroAdaConfig(k=2, target_modules=targets, backend=backend, selection=selection, **options)
    return get_peft_model(copy.deepcopy(network), config)


def _filled(kind, backend):
    """An adapted network with values, and a batch that takes gradients."""
    network, x, targets = make_network(kind)
    return _adapted(network, targets, backend, init_weights=False), x.requires_grad_()


def _base_bits(model):
    named = model.base_model.model.state_dict().items()
    return {name.replace(".base_layer", ""): bits(tensor) for name, tensor in named if "neuroada_" not in name}


def _assert_base_is(model, expected):
    now = _base_bits(model)
    assert now.keys() == expected.keys()
    for name in expected:
        assert torch.equal(now[name], expected[name]), name


def _trained_weights(model, network):
    """Per parameter of the plain network that adapters train: the parameter and a mask of its trained entries."""
    masks: dict[str, torch.Tensor] = {}
    for name, layer in layers_of(model.base_model.model).items():
        base, mask = layer.get_base_layer(), (layer.get_delta_weight("default") != 0)
        if isinstance(base, Part):
            key = f"{name.rpartition('.')[0]}.{base.parameter_name}"
            masks.setdefault(key, torch.zeros_like(network.get_parameter(key), dtype=torch.bool))
            base.rows_of(masks[key]).copy_(mask)
        else:
            masks[f"{name}.weight"] = mask
    return {name: (network.get_parameter(name), mask) for name, mask in masks.items()}


def _fit(model, optimizer, x, steps, after_backward=lambda: None):
    target = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(5))
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x).float(), target)
        optimizer.zero_grad()
        loss.backward()
        after_backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("kind", "backend", "optimizer"),
    [(kind, "auto", optimizer) for kind in NETWORKS for optimizer in OPTIMIZERS]
    + [(kind, backend, "Adam") for kind in ("Conv2d", "shared") for backend in ("bypass", "dense")],
)
def test_training_equals_masked_training_of_dense_weights(kind, backend, optimizer):
    network, x, targets = make_network(kind)
    model = _adapted(network, targets, backend)
    values = [layer.deltas["default"].weight.data for layer in layers_of(model).values()]
    for ones in values:  # to see where they are
        ones.fill_(1.0)
    weights = _trained_weights(model, network)
    for zeros in values:
        zeros.zero_()

    def mask_gradients():
        for parameter, mask in weights.values():
            parameter.grad.mul_(mask)

    parameters = list({id(parameter): parameter for parameter, _ in weights.values()}.values())
    network.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    ours = _fit(model, OPTIMIZERS[optimizer](p for p in model.parameters() if p.requires_grad), x, 50)
    theirs = _fit(network, OPTIMIZERS[optimizer](parameters), x, 50, mask_gradients)
    assert theirs[-1] < 0.9 * theirs[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    merged = {name.replace(".base_layer", ""): tensor for name, tensor in model.base_model.model.state_dict().items()}
    for name, (parameter, _) in weights.items():
        torch.testing.assert_close(merged[name], parameter.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "backend", "dtype"), KINDS_AND_BACKENDS, ids=str)
def test_adamw_with_weight_decay_moves_no_bit_of_the_base(kind, backend, dtype):
    """60 steps over all parameters, as a Trainer hands them over."""
    network, x, targets = make_network(kind)
    model, x = _adapted(network.to(dtype), targets, backend), x.to(dtype)
    original = _base_bits(model)
    losses = _fit(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1), x, 60)
    assert losses[-1] < 0.9 * losses[0]
    _assert_base_is(model, original)


@pytest.mark.parametrize("selection", ["random_layer", "magnitude_network"])
@EVERY_KIND
def test_a_saved_adapter_gives_the_same_outputs(kind, selection, tmp_path):
    network, x, targets = make_network(kind)
    model = _adapted(network, targets, selection=selection)
    _fit(model, torch.optim.AdamW(model.parameters(), lr=1e-2), x, 3)
    model.eval().save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(network), tmp_path, **options).eval()
        with torch.no_grad():
            assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
@SOME_KINDS_AND_BACKENDS
def test_gradient_checkpointing_gives_the_same_gradients(kind, backend, use_reentrant):
    model, x = _filled(kind, backend)
    original, gradients = _base_bits(model), []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        for leaf in (x, *trained):
            leaf.grad = None
        call(x).square().sum().backward()
        gradients.append([leaf.grad.clone() for leaf in (x, *trained)])
    _assert_base_is(model, original)
    for plain, again in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        # Not bit for bit: "auto" takes the bypass in the first forward of a reentrant checkpoint, which has no graph.
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-4)


def _saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": _saved_and_loaded,
}


@pytest.mark.parametrize("how", COPIES)
@SOME_KINDS_AND_BACKENDS
def test_a_copy_between_forward_and_backward_sees_the_original(kind, backend, how):
    model, x = _filled(kind, backend)
    original = _base_bits(model)
    y = model(x)
    other = COPIES[how](model)
    y.sum().backward()
    _assert_base_is(other, original)
    _assert_base_is(model, original)
    assert torch.equal(other(x), model(x))
    copied = tensors_of(other)
    for name, mine in tensors_of(model).items():
        assert torch.equal(mine, copied[name]) and mine.data_ptr() != copied[name].data_ptr(), name


@EVERY_BACKEND
def test_hooks_during_backward_see_the_original(backend):
    """Gradients of x and of values run between the products of one layer's backward."""
    model, x = _filled("Linear", backend)
    original, calls = _base_bits(model), []

    def look(_):
        calls.append(1)
        _assert_base_is(model, original)

    first, activation, second = model.base_model.model
    hidden = activation(first(x))
    for tensor in (x, hidden, first.deltas["default"].weight, second.deltas["default"].weight):
        tensor.register_hook(look)
    second(hidden).sum().backward()
    assert len(calls) == 4


@EVERY_BACKEND
def test_backward_twice_through_one_graph_accumulates(backend):
    model, x = _filled("Linear", backend)
    y = model(x).sum()
    y.backward(retain_graph=True)
    once = x.grad.clone()
    y.backward()
    torch.testing.assert_close(x.grad, 2 * once)


@EVERY_BACKEND
def test_two_forwards_before_their_backwards(backend):
    """As with gradient accumulation over a shared layer, or a layer that is called twice."""
    layer = adapt(nn.Linear(8, 8).requires_grad_(False), 2, backend)
    values = layer.deltas["default"].weight
    first, second = torch.randn(5, 8), torch.randn(5, 8)
    alone = [torch.autograd.grad(layer(layer(x)).sum(), values)[0] for x in (first, second)]
    outputs = [layer(layer(x)).sum() for x in (first, second)]
    for y in outputs:
        y.backward()
    torch.testing.assert_close(values.grad, alone[0] + alone[1])


@EVERY_BACKEND
@pytest.mark.parametrize("kind", ["Linear", "2d"])
def test_values_changed_after_forward_are_noticed_in_backward(kind, backend):
    """Values are saved as they were: silently using newer ones would be a wrong gradient of x."""
    layer = adapt(KINDS[kind].build(), 2, backend)
    y = layer(KINDS[kind].draw())
    with torch.no_grad():
        layer.deltas["default"].weight.add_(1)
    if backend == "reference":  # saves a copy composed of them
        y.sum().backward()
        return
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


@EVERY_BACKEND
@pytest.mark.parametrize("kind", ["Linear", "2d"])
def test_no_gradient_is_kept_under_no_grad_or_without_trained_values(kind, backend):
    layer, x = adapt(KINDS[kind].build(), 2, backend), KINDS[kind].draw().detach()
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        inferred = layer(x)
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    torch.testing.assert_close(layer(x), inferred.clone())
