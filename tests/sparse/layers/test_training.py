"""Training, for every layer type: as masked training of dense weights, and the base never moves."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_ext import NeuroAdaConfig
from peft_ext.sparse.bases.projection import Projection
from peft_ext.sparse.layers import SparseLayer
from peft_ext.sparse.ops import BACKENDS
from tests._models.networks import NETWORKS, make_network

from .._asserts import assert_same_bits, bits


EVERY_KIND = pytest.mark.parametrize("kind", NETWORKS)
# Every type with the backend that is chosen for it, and every backend with some types.
KINDS_AND_BACKENDS = [(kind, "auto") for kind in NETWORKS] + [
    (kind, backend) for kind in ("Conv2d grouped", "MultiheadAttention") for backend in BACKENDS if backend != "auto"
]
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


def _adapted(network, targets, backend="auto", selection="magnitude"):
    config = NeuroAdaConfig(k=2, target_modules=targets, backend=backend, selection=selection)
    return get_peft_model(copy.deepcopy(network), config)


def _trained_weights(model, network):
    """Per parameter of the plain network that adapters train: the parameter and a mask of its trained entries."""
    masks: dict[str, torch.Tensor] = {}
    for name, layer in model.base_model.model.named_modules():
        if not isinstance(layer, SparseLayer):
            continue
        base, mask = layer.get_base_layer(), (layer.get_delta_weight("default") != 0)
        if isinstance(base, Projection):
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
        loss = nn.functional.mse_loss(model(x), target)
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
    for layer in model.modules():  # all ones, to see where they are
        if isinstance(layer, SparseLayer):
            layer.deltas["default"].weight.data.fill_(1.0)
    weights = _trained_weights(model, network)
    for layer in model.modules():
        if isinstance(layer, SparseLayer):
            layer.deltas["default"].weight.data.zero_()

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


@pytest.mark.parametrize(("kind", "backend"), KINDS_AND_BACKENDS)
def test_adamw_with_weight_decay_moves_no_bit_of_the_base(kind, backend):
    """60 steps over all parameters, as a Trainer hands them over."""
    network, x, targets = make_network(kind)
    model = _adapted(network, targets, backend)
    original = {name: bits(tensor) for name, tensor in network.state_dict().items()}
    losses = _fit(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1), x, 60)
    assert losses[-1] < 0.9 * losses[0]
    now = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in model.base_model.model.state_dict().items()
        if "neuroada_" not in name
    }
    assert now.keys() == original.keys()
    for name, tensor in now.items():
        assert_same_bits(tensor, original[name])


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


@EVERY_KIND
def test_merging_a_model_restores_every_bit(kind):
    network, x, targets = make_network(kind)
    model = _adapted(network, targets, selection="random").eval()
    _fit(model, torch.optim.AdamW(model.parameters(), lr=1e-2), x, 3)
    before = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    expected = model(x).detach()
    for _ in range(2):
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(model(x), expected)
        model.unmerge_adapter()
        for name, tensor in model.state_dict().items():
            assert_same_bits(tensor, before[name])
    merged = model.merge_and_unload()
    assert [type(module) for module in merged.modules()] == [type(module) for module in network.modules()]
    torch.testing.assert_close(merged(x), expected)
