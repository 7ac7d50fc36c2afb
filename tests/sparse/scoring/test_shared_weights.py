"""Scores of a weight that other modules use too: the gradient that an adapter on the scored layers would get."""

import copy

import pytest
import torch
from torch import nn

from peft_ext import NeuroAdaConfig, gradient_scores
from tests._models.networks import small_llama


WIDTH = 6


def alias_of(parameter):
    return nn.Parameter(parameter.data)


EVERY_TIE = pytest.mark.parametrize(
    "tie", [lambda parameter: parameter, alias_of], ids=["one parameter", "one storage"]
)


@EVERY_TIE
def test_a_tied_output_layer_is_scored_as_an_untied_one(tie):
    """The embedding's look-up gradient is none of the output layer's."""
    ids = torch.randint(0, 16, (4, 6), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": ids, "labels": ids}]
    config = NeuroAdaConfig(target_modules=["lm_head", "q_proj"])
    model = small_llama(tie_word_embeddings=True)
    model.lm_head.weight = tie(model.model.embed_tokens.weight)
    before, version = model.lm_head.weight, model.lm_head.weight.detach().clone()
    scores = gradient_scores(model, batches, "model", config=config, progress=False)
    assert model.lm_head.weight is before and torch.equal(before, version) and before.grad is None

    untied = small_llama(tie_word_embeddings=True)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    untied(ids, labels=ids).loss.backward()
    torch.testing.assert_close(scores["lm_head"], untied.lm_head.weight.grad)
    name = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(scores[name], untied.get_submodule(name).weight.grad)
    assert not torch.allclose(scores["lm_head"], untied.lm_head.weight.grad + untied.model.embed_tokens.weight.grad)


class Twins(nn.Module):
    """Two layers that see one memory, and one that sees only the first rows of it."""

    def __init__(self, tie):
        super().__init__()
        self.one, self.two, self.part = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.two.weight = tie(self.one.weight)
        self.part.weight = nn.Parameter(self.one.weight.data[:3])

    def forward(self, x):
        return self.part(torch.tanh(self.two(torch.tanh(self.one(x)))))


@EVERY_TIE
@pytest.mark.parametrize("absolute", [False, True])
def test_layers_over_one_memory_are_scored_by_their_common_gradient(absolute, tie):
    """An adapter has one set of values for both, and none for a layer that sees the weight in another way."""
    torch.manual_seed(0)
    model, x = Twins(tie), torch.randn(7, WIDTH)
    batches = [(x, torch.tensor(0)), (x.flip(1), torch.tensor(0))]

    def loss(output, labels):
        return output.pow(3).sum()

    options = {"features": lambda output: output, "progress": False, "absolute": absolute}
    scores = gradient_scores(model, batches, loss, **options)
    dense = copy.deepcopy(model)
    dense.one.weight = dense.two.weight = nn.Parameter(model.one.weight.detach().clone())
    dense.part.weight = nn.Parameter(model.part.weight.detach().clone())
    expected = {"one": 0, "part": 0}
    for batch, _ in batches:
        dense.zero_grad()
        loss(dense(batch), None).backward()
        for name in expected:
            gradient = dense.get_submodule(name).weight.grad
            expected[name] = expected[name] + (gradient.abs() if absolute else gradient)
    for name, other in (("one", "one"), ("two", "one"), ("part", "part")):
        torch.testing.assert_close(scores[name], expected[other])
