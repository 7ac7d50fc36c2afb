"""Entries are chosen on whole weights, also where this process holds none of them: a stand-in for DeepSpeed ZeRO-3."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_ext import NeuroAdaConfig
from tests.contract._common import layers_of


class Mixed(nn.Module):
    """A layer of each kind."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv1d, self.conv = nn.Linear(6, 8), Conv1D(4, 8), nn.Conv2d(3, 8, (2, 3))
        self.attention = nn.MultiheadAttention(8, 2)


TARGETS = ["linear", "conv1d", "conv", "attention"]


@pytest.fixture
def deepspeed(monkeypatch):
    """A module `deepspeed` with what is asked of it; `gathered` lists the shapes that were put together."""
    gathered = []

    @contextmanager
    def gathered_parameters(parameters, modifier_rank=None):
        assert modifier_rank is None  # nothing is written
        for parameter in parameters:
            parameter.data = parameter.pieces
            gathered.append(tuple(parameter.shape))
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)

    stand_in = SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gathered_parameters), gathered=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", stand_in)
    return stand_in


def emptied(model):
    """As `deepspeed.zero.Init` leaves parameters."""
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape, parameter.pieces = number, parameter.shape, parameter.data
        parameter.data = torch.empty(0)
    return model


def mixed():
    torch.manual_seed(0)
    return Mixed()


def tensors(model):
    return {
        f"{name}.{key}": tensor
        for name, layer in layers_of(model).items()
        for key, tensor in layer.deltas["default"].state_dict().items()
    }


@pytest.mark.parametrize(
    "options", [{"selection": "magnitude"}, {"selection": "magnitude_network"}, {"neuron_ratio": 0.5}], ids=str
)
def test_the_same_entries_as_on_whole_weights(deepspeed, options):
    config = {"k": 2, "target_modules": TARGETS, **options}
    expected = tensors(get_peft_model(mixed(), NeuroAdaConfig(**config)))
    assert not deepspeed.gathered
    model = get_peft_model(emptied(mixed()), NeuroAdaConfig(**config))
    found = tensors(model)
    assert found.keys() == expected.keys() and len(found) >= 7 * 3
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert {(8, 6), (8, 4), (8, 3, 2, 3), (24, 8), (8, 8)} <= set(deepspeed.gathered)
    for name, parameter in model.named_parameters():
        assert "_delta" in name or parameter.numel() == 0, name  # gathered for no longer than needed


def test_loading_compares_the_whole_base(deepspeed, tmp_path):
    get_peft_model(mixed(), NeuroAdaConfig(k=2, target_modules=TARGETS)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(emptied(mixed()), tmp_path)
    assert deepspeed.gathered and len(tensors(loaded)) >= 7 * 3
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="another base"):
        PeftModel.from_pretrained(emptied(Mixed()), tmp_path)


def test_merging_says_what_to_do_instead(deepspeed):
    model = get_peft_model(emptied(mixed()), NeuroAdaConfig(k=2, target_modules=["linear"]))
    with pytest.raises(ValueError, match="sharded over several processes.*one process"):
        model.merge_adapter()
    assert not any(layer.merged for layer in layers_of(model).values())


def test_saving_an_ungathered_state_says_what_to_do_instead(deepspeed, tmp_path):
    model = get_peft_model(mixed(), NeuroAdaConfig(k=2, target_modules=["linear"]))
    with pytest.raises(ValueError, match=r"lacks '.*linear.*get_state_dict.*stage3_gather"):
        model.save_pretrained(tmp_path, state_dict={})
    assert not list(tmp_path.glob("*.safetensors"))


def test_saving_a_piece_says_what_to_do_instead(tmp_path):
    model = get_peft_model(mixed(), NeuroAdaConfig(k=2, target_modules=["linear"]))
    pieces = {name: t[:4] if name.endswith("default.weight") else t for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="sharded over several processes.*get_state_dict"):
        model.save_pretrained(tmp_path, state_dict=pieces)
    assert not list(tmp_path.glob("*.safetensors"))
