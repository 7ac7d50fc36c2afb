"""Training a sparse adapter is masked training of the dense weights, and nothing else can move."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.contract._common import METHODS, assert_equal_bits, base_bits, layers_of


class Every(nn.Module):
    """One layer of every kind that has neurons, and a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, stride=2)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.linear = nn.Linear(54, 10)
        self.transposed = Conv1D(8, 10)
        self.no_bias = nn.Linear(8, 8, bias=False)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.tanh(self.depthwise(torch.tanh(self.conv(x)))).flatten(1)
        return self.classifier(torch.tanh(self.no_bias(torch.tanh(self.transposed(torch.tanh(self.linear(x)))))))


TARGETS = ["conv", "depthwise", "linear", "transposed", "no_bias"]


@pytest.fixture
def job(tiny, inputs_of):
    """Function: name of a model to a new copy and a function that gives its loss."""

    def make(name):
        x, labels = inputs_of("vit")["pixel_values"], torch.tensor([0, 1, 2])
        if name == "vit":
            return tiny("vit"), lambda model: model(pixel_values=x, labels=labels).loss
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Every(), lambda model: nn.functional.cross_entropy(model(x), labels)

    return make


def step(model, loss_of, optimizer, mask=lambda: None):
    loss = loss_of(model)
    loss.backward()
    mask()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("method", METHODS)
def test_weight_decay_moves_no_entry_that_was_not_selected(job, method):
    base, loss_of = job("every")
    model = get_peft_model(base, METHODS[method](target_modules=TARGETS))
    bits = base_bits(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, 1e-2, weight_decay=0.1)
    first = last = None
    for _ in range(40):
        last = step(model, loss_of, optimizer)
        first = last if first is None else first
    assert last < first
    assert_equal_bits(base_bits(model), bits)
    chosen = {name: layer.deltas["default"].support for name, layer in layers_of(model).items()}
    before = {name: layer.base_matrix().clone() for name, layer in layers_of(model).items()}
    model.merge_adapter()
    for path, layer in layers_of(model).items():
        after = layer.base_matrix().clone()
        assert not torch.equal(after, before[path]) or not chosen[path].entries, path
        chosen[path].scatter_(after, chosen[path].gather(before[path]))
        assert torch.equal(after.view(torch.int32), before[path].view(torch.int32)), path


def masked_twin(model, base):
    """The dense model whose gradients are masked to what the adapter trains; and the function that masks them."""
    twin, masks = base, {}
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    for path, layer in layers_of(model).items():
        dense = twin.get_submodule(path.removeprefix("base_model.model."))
        delta = layer.deltas["default"]
        mask = torch.zeros(layer.base_matrix().shape)
        delta.support.scatter_(mask, torch.ones(delta.indices.shape))
        mask = mask.t() if type(dense).__name__ == "Conv1D" else mask.view(dense.weight.shape)
        masks[dense.weight.requires_grad_(True)] = mask
        if delta.bias is not None:
            dense.bias.requires_grad_(True)
    for path, _ in model.named_modules():
        if path.endswith(".modules_to_save"):
            head = twin.get_submodule(path.removeprefix("base_model.model.").removesuffix(".modules_to_save"))
            head.requires_grad_(True)

    def mask_gradients():
        for weight, mask in masks.items():
            weight.grad *= mask

    return twin, mask_gradients


@pytest.mark.parametrize(
    ("name", "method", "make"),
    [
        *(("every", method, torch.optim.Adam) for method in METHODS),
        ("every", "gps", torch.optim.SGD),
        ("vit", "gps", torch.optim.Adam),
    ],
)
def test_equals_masked_training_of_the_dense_weights(job, name, method, make):
    base, loss_of = job(name)
    model = get_peft_model(base, METHODS[method](target_modules=TARGETS if name == "every" else None))
    twin, mask = masked_twin(model, job(name)[0])
    # Adam divides by the gradient's size: on entries whose gradient is rounding noise two orders of summation differ
    # by the whole step, so these tests take a larger epsilon than its default.
    options = {"lr": 1e-3, "eps": 1e-4} if make is torch.optim.Adam else {"lr": 1e-2}
    optimizers = [make([p for p in m.parameters() if p.requires_grad], **options) for m in (model, twin)]
    for _ in range(20):
        step(model, loss_of, optimizers[0])
        step(twin, loss_of, optimizers[1], mask)
    merged = model.merge_and_unload().state_dict()
    expected = twin.state_dict()
    start = job(name)[0].state_dict()
    assert any(not torch.equal(expected[key], start[key]) for key in expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(
            merged[key], tensor, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key} {text}"
        )


@pytest.mark.parametrize("method", METHODS)
def test_optimiser_state_follows_the_trained_numbers(tiny, method):
    """What masked training of dense weights keeps in the optimiser, two numbers for each weight, is gone."""
    model = get_peft_model(tiny("vit"), METHODS[method]())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    labels = torch.tensor([0, 1, 2])
    model(pixel_values=torch.randn(3, 1, 8, 8), labels=labels).loss.backward()
    optimizer.step()
    held = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.numel() > 1)
    trained = model.get_nb_trainable_parameters()[0]
    assert held == 2 * sum(
        p.numel() for p in model.parameters() if p.requires_grad and p.grad is not None and p.numel()
    )
    assert held <= 2 * trained < 2 * sum(p.numel() for p in tiny("vit").parameters())


def test_biases_are_those_of_the_adapted_layers_alone(tiny):
    model = get_peft_model(tiny("bert"), METHODS["gps"](target_modules=["query"], modules_to_save=[]))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rpartition("query.")[2] for n in trained} == {"gps_delta.default.weight", "gps_delta.default.bias"}
    assert len(trained) == 4


def test_layer_without_a_bias_gets_none(tiny):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3, bias=False)), METHODS["gps"](target_modules=["0"]))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.0.gps_delta.default.weight"
    ]
