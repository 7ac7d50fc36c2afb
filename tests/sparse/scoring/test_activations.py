"""Forward-only scores against sums over every input of every sample."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_ext import NeuroAdaConfig, activation_scores
from tests.contract._common import layers_of
from tests.contract._untouched import Untouched


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.grouped = nn.Conv2d(4, 6, 2, groups=2)
        self.linear = nn.Linear(6, 5)
        self.transposed = Conv1D(3, 5)

    def forward(self, x):
        x = torch.relu(self.grouped(torch.tanh(self.conv(x))))
        return self.transposed(torch.tanh(self.linear(x.flatten(2).mT)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def loader(seed, batches=2, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(3 + number, 2, 6, 6, generator=generator), None) for number in range(batches)]


def inputs_of(net, batches):
    """What enters each layer, all batches together: `[samples and positions, channels]`."""
    seen = {name: [] for name, _ in net.named_children()}
    with torch.no_grad():
        for x, _ in batches:
            seen["conv"].append(x)
            seen["grouped"].append(torch.tanh(net.conv(x)))
            seen["linear"].append(torch.relu(net.grouped(seen["grouped"][-1])).flatten(2).mT)
            seen["transposed"].append(torch.tanh(net.linear(seen["linear"][-1])))
    return {
        name: torch.cat([(x.movedim(1, -1) if x.dim() == 4 else x).flatten(0, -2) for x in parts])
        for name, parts in seen.items()
    }


def means(net, batches):
    return {name: x.abs().mean(0) for name, x in inputs_of(net, batches).items()}


def by_hand(net, factors):
    """|w| times the factor of the channel that each weight sees, one by one."""
    scores = {}
    for name, module in net.named_children():
        weight = module.weight.detach()
        score = torch.empty_like(weight)
        for index in torch.cartesian_prod(*map(torch.arange, weight.shape)).tolist():
            if isinstance(module, Conv1D):
                channel = index[0]
            elif isinstance(module, nn.Conv2d):
                per_group = module.in_channels // module.groups
                channel = index[0] // (module.out_channels // module.groups) * per_group + index[1]
            else:
                channel = index[1]
            score[tuple(index)] = weight[tuple(index)].abs() * factors[name][channel]
        scores[name] = score
    return scores


def test_score_is_magnitude_times_activation(net):
    scores, expected = activation_scores(net, loader(1)), by_hand(net, means(net, loader(1)))
    assert set(scores) == set(expected) and len(scores) == 4
    for name in expected:
        torch.testing.assert_close(scores[name], expected[name], atol=1e-6, rtol=1e-5)


def test_growth_is_relative_to_the_anchor(net):
    before, after = means(net, loader(2)), means(net, loader(1, scale=2.0))
    expected = by_hand(net, {name: after[name] / before[name] for name in after})
    scores = activation_scores(net, loader(1, scale=2.0), anchor=loader(2))
    for name in expected:
        torch.testing.assert_close(scores[name], expected[name], atol=1e-6, rtol=1e-5)


def test_input_that_was_silent_before_ranks_first_and_finite():
    net = nn.Sequential(nn.Linear(3, 2))
    anchor = [(torch.tensor([[1.0, 1.0, 0.0]]), None)]
    scores = activation_scores(net, [(torch.ones(1, 3), None)], anchor=anchor)["0"]
    assert torch.isfinite(scores).all() and torch.equal(scores.argmax(1), torch.tensor([2, 2]))


def test_an_adapter_takes_the_largest(net):
    scores = dict(activation_scores(net, loader(1)))
    config = NeuroAdaConfig(k=2, selection="activation", target_modules="all-neurons")
    model = get_peft_model(net, config.with_scores(activation_scores(net, loader(1))))
    assert len(layers_of(model)) == 4
    for name, layer in layers_of(model).items():
        score = scores[name.removeprefix("base_model.model.")]
        rows = score.t() if name.endswith("transposed") else score.flatten(1)
        chosen = rows.gather(1, layer.deltas["default"].indices.long())
        assert torch.equal(chosen.sort(1).values, rows.topk(2, dim=1).values.sort(1).values), name


def test_nothing_of_the_size_of_a_weight_is_kept(net):
    scores = activation_scores(net, loader(1))
    assert {name: factor.numel() for name, factor in scores.factors.items()} == {
        "conv": 2, "grouped": 4, "linear": 6, "transposed": 5
    }  # fmt: skip


def test_model_is_left_as_it_was(net):
    net.train()
    net.conv.eval()
    with Untouched(net), pytest.raises(RuntimeError):
        activation_scores(net, [*loader(1), (torch.zeros(1, 3, 6, 6), None)])
    assert all(parameter.grad is None for parameter in net.parameters())


def test_works_without_labels_on_a_transformer(tiny, ids):
    scores = activation_scores(tiny("llama"), [{"input_ids": ids}])
    assert "lm_head" not in scores and len(scores) == 14
    assert all(score.any() for score in scores.values())


def test_attention_that_hides_its_activations_is_an_error():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    with pytest.raises(TypeError, match="'attention.q_proj' is inside an nn.MultiheadAttention(.|\n)*gradient_scores"):
        activation_scores(model, [torch.zeros(1, 4)])
