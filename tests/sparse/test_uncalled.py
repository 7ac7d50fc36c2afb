"""Adapted layers that are never called, which no reading of the model's source has found."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_ext import NeuroAdaConfig


NAMES = ["up", "down"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        down = getattr(self, NAMES[1])
        return self.up(x) @ down.weight


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)


def _products(pair, x):
    return x @ pair.query.weight @ pair.key.weight


class Reader(nn.Module):
    """Beside a layer, a module none of whose layers is called."""

    def __init__(self):
        super().__init__()
        self.attention = Pair()
        self.mlp = nn.Linear(4, 4)

    def forward(self, x):
        return self.mlp(_products(self.attention, x))


class Experts(nn.Module):
    """Calls one of two lists' items, as a router does."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)}) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        return self.experts[0]["down"](self.experts[0]["up"](self.gates[0](x)))


def _adapted(base, **options):
    torch.manual_seed(0)
    return get_peft_model(base, NeuroAdaConfig(target_modules="all-linear", **options))


def _blocks(**options):
    torch.manual_seed(0)
    return _adapted(nn.Sequential(Block(), Block()), **options)


def _step(model):
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _said(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    return [str(w.message) for w in caught if "was never called" in str(w.message)], result


def _save(model, path):
    return lambda: model.save_pretrained(path)


@pytest.mark.parametrize("how", ["eager", "compiled", "block by block"])
@pytest.mark.parametrize("occasion", ["evaluation", "saving"])
def test_training_names_them_once(occasion, how, tmp_path):
    torch._dynamo.reset()
    model = _blocks().train()
    if how == "block by block":
        for block in model.base_model.model:
            block.compile(backend="eager")
    _step(torch.compile(model, backend="eager") if how == "compiled" else model)
    first, second = (model.eval, _save(model, tmp_path))[:: 1 if occasion == "evaluation" else -1]
    (message,), _ = _said(first)
    assert "'0.down'" in message and "(2 layers in all)" in message and "`exclude_modules`" in message
    assert not _said(second)[0] and not _said(model.train().eval)[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_modules_without_any_called_layer_are_named(compiled):
    torch._dynamo.reset()
    model = _adapted(nn.Sequential(Reader(), Reader())).train()
    _step(torch.compile(model, backend="eager") if compiled else model)
    (message,), _ = _said(model.eval)
    assert "'0.attention.query' (4 layers in all)" in message


def test_merging_names_modules_without_any_called_layer():
    model = _adapted(nn.Sequential(Reader(), Reader()), init_weights=False)
    model(torch.randn(3, 4))
    (message,), _ = _said(model.merge_and_unload)
    assert "'0.attention.query' (4 layers in all)" in message and "values there" in message


def test_merging_names_those_with_values():
    model = _blocks(init_weights=False)
    x = torch.randn(3, 4)
    before = model(x)
    (message,), _ = _said(model.merge_adapter)
    assert "'base_model" not in message and "'0.down' (2 layers in all)" in message and "values there" in message
    assert not torch.allclose(model(x), before)
    model.unmerge_adapter()
    nn.init.zeros_(model.base_model.model[0].down.neuroada_delta["default"].weight)
    (message,), _ = _said(model.merge_and_unload)
    assert "'1.down' was" in message


def test_nothing_is_said_without_a_call(tmp_path):
    """As where an adapter is loaded to be merged and served."""
    torch.manual_seed(0)
    assert not _said(_save(_blocks(init_weights=False), tmp_path))[0]
    said, model = _said(lambda: PeftModel.from_pretrained(_blocks().unload(), tmp_path).eval())
    assert not said and not _said(model.merge_and_unload)[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_is_said_of_experts_without_tokens_and_of_adapters_that_are_not_active(compiled, tmp_path):
    torch._dynamo.reset()
    model = _adapted(Experts(), init_weights=False).train()
    _step(torch.compile(model, backend="eager") if compiled else model)
    assert not _said(model.eval)[0] and not _said(_save(model, tmp_path))[0] and not _said(model.merge_and_unload)[0]

    class Both(Block):
        def forward(self, x):
            return self.down(self.up(x))

    model = _adapted(Both(), init_weights=False)
    model.add_adapter("other", NeuroAdaConfig(target_modules=["down"], init_weights=False))
    model(torch.randn(3, 4))
    model.set_adapter("other")
    with model.disable_adapter():
        model(torch.randn(3, 4))
    assert not _said(model.merge_and_unload)[0]
