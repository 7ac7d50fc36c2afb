"""Scores of a compiled model: those of the model that was compiled, under its names."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_ext import NeuroAdaConfig, activation_scores, gradient_scores


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.body(x))


BATCHES = [(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2)]
SCORERS = {"gradient": gradient_scores, "activation": activation_scores}


def _compiled(network, part):
    if part == "body":
        network.body = torch.compile(network.body, backend="eager")
        return network
    network = torch.compile(network, backend="eager")
    network(BATCHES[0][0])  # compiled before any hook is there, as in use
    return network


@pytest.fixture
def network():
    torch.manual_seed(0)
    yield Network()
    torch._dynamo.reset()


@pytest.mark.parametrize("part", ["whole", "body"])
@pytest.mark.parametrize("criterion", SCORERS)
def test_scores_serve_the_compiled_and_the_plain_model(network, criterion, part):
    config = NeuroAdaConfig(k=2, selection=criterion, target_modules=["body.0", "body.2"])
    expected = dict(SCORERS[criterion](network, BATCHES, config=config, progress=False))
    compiled = _compiled(copy.deepcopy(network), part)
    scores = dict(SCORERS[criterion](compiled, BATCHES, config=config, progress=False))
    assert scores.keys() == expected.keys() == {"body.0", "body.2"}
    assert all(torch.equal(scores[name], expected[name]) for name in expected)
    for model in (copy.deepcopy(network), compiled):
        options = copy.deepcopy(config)
        options.target_modules = r".*\b[02]"
        adapted = get_peft_model(model, options.with_scores(scores))
        indices = [tensor for name, tensor in adapted.state_dict().items() if name.endswith("indices")]
        assert len(indices) == 2
        for found, score in zip(indices, expected.values(), strict=True):
            assert torch.equal(found.long(), score.abs().topk(2, 1).indices.sort(1).values)
