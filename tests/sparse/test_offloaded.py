"""Bases that accelerate has offloaded to the CPU or to disk, without a device map or with one."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model
from torch import nn

from peft_ext import NeuroAdaConfig
from tests.contract._common import layers_of
from tests.tuners.neuroada._common import logits

from ._asserts import assert_same_support


TARGETS = ["q_proj", "down_proj"]


def _dispatched(model, folder):
    places = {
        "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
        "model.rotary_emb": "cpu", "lm_head": "cpu",
    }  # fmt: skip
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


OFFLOADED = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device="cpu"),
    "dispatched": _dispatched,
}
KINDS = pytest.mark.parametrize("kind", OFFLOADED)


@pytest.fixture
def offloaded(tiny, tmp_path):
    """Function: kind to an offloaded Llama. Its last layer's weights are on the meta device."""

    def make(kind):
        folder = tmp_path / "offloaded"
        folder.mkdir(exist_ok=True)
        model = OFFLOADED[kind](tiny("llama"), folder)
        assert model.model.layers[1].mlp.down_proj.weight.is_meta
        return model

    return make


def adapt(base, **options):
    torch.manual_seed(0)
    options = {"k": 2, "init_weights": False, "target_modules": TARGETS, **options}
    return get_peft_model(base, NeuroAdaConfig(**options)).eval()


@pytest.mark.parametrize("selection", ["magnitude", "magnitude_network", "random"])
@KINDS
def test_a_new_adapter_is_that_of_the_base_in_memory(offloaded, tiny, ids, kind, selection):
    expected = adapt(tiny("llama"), selection=selection)
    model = adapt(offloaded(kind), selection=selection)
    for (name, mine), theirs in zip(layers_of(model).items(), layers_of(expected).values(), strict=True):
        delta, other = mine.deltas["default"], theirs.deltas["default"]
        assert_same_support(delta.support, other.support)
        assert torch.equal(delta.fingerprint, other.fingerprint), name
        assert not delta.weight.is_meta and not delta.pending
    torch.testing.assert_close(logits(model, ids), logits(expected, ids))
    assert model.base_model.model.model.layers[1].mlp.down_proj.base_layer.weight.is_meta  # and away again


@KINDS
def test_it_trains_as_on_the_base_in_memory(offloaded, tiny, ids, kind):
    models = [adapt(offloaded(kind)), adapt(tiny("llama"))]
    for model in models:
        model(ids, labels=ids).loss.backward()
    for mine, theirs in zip(*(layers_of(model).values() for model in models), strict=True):
        torch.testing.assert_close(mine.deltas["default"].weight.grad, theirs.deltas["default"].weight.grad)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@KINDS
def test_files_go_from_an_offloaded_base_to_one_in_memory_and_back(
    offloaded, tiny, ids, kind, low_cpu_mem_usage, tmp_path
):
    model = adapt(offloaded(kind))
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    for base in (tiny("llama"), offloaded(kind)):
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage).eval()
        torch.testing.assert_close(logits(loaded, ids), expected)


@KINDS
def test_another_base_is_told_though_its_weights_are_elsewhere(offloaded, tiny, kind, tmp_path):
    other = tiny("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    adapt(other).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="another base model"):
        PeftModel.from_pretrained(offloaded(kind), tmp_path / "adapter")


@pytest.mark.parametrize("loaded", [False, True])
@KINDS
def test_merge_unmerge_and_unload(offloaded, tiny, ids, kind, loaded, tmp_path):
    base = logits(tiny("llama"), ids)
    model = adapt(offloaded(kind))
    if loaded:
        model.save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(offloaded(kind), tmp_path / "adapter").eval()
    expected = logits(model, ids)
    for _ in range(2):
        model.merge_adapter()
        torch.testing.assert_close(logits(model, ids), expected)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(logits(model, ids), base)
    torch.testing.assert_close(logits(model.merge_and_unload(), ids), expected)


@KINDS
def test_one_layer_merges_by_itself_and_comes_out_when_adapters_are_off(offloaded, tiny, ids, kind):
    base = logits(tiny("llama"), ids)
    model = adapt(offloaded(kind))
    expected = logits(model, ids)
    for layer in layers_of(model).values():
        layer.merge()
    torch.testing.assert_close(logits(model, ids), expected)
    with model.disable_adapter():  # which unmerges in the forward pass
        assert torch.equal(logits(model, ids), base)
    torch.testing.assert_close(logits(model, ids), expected)


def test_an_offloaded_attention_is_refused_before_anything_is_changed():
    model = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(TypeError, match="'self_attn' is an offloaded nn.MultiheadAttention.*Keep it on a device"):
        get_peft_model(model, NeuroAdaConfig(k=1, target_modules=["self_attn", "linear1"]))
    assert not layers_of(model)
