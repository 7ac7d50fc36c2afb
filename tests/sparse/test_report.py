"""The selection report against positions counted one by one."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

from peft_ext import NeuroAdaConfig, PSNConfig, selection_report
from tests.contract._common import adapted, add, layers_of
from tests.sparse._asserts import positions


@pytest.fixture
def model(tiny):
    """Three adapters with different entries; `third` is on some layers only."""
    model = adapted(tiny("vit"), "gps", k=4)
    add(model, "second", "gps", k=2, selection="random", exclude_modules=["fc1"])
    return add(model, "third", "gps", k=1, selection="magnitude_network", target_modules=["fc1", "q_proj"])


def held(model, adapter):
    return {
        (name, *place)
        for name, layer in layers_of(model).items()
        if adapter in layer.deltas
        for place in positions(layer.deltas[adapter].support)
    }


def test_counts_are_those_of_the_layers(model):
    report = selection_report(model)
    assert report.adapters == ["default", "second", "third"]
    for count in report.counts:
        layer = layers_of(model)[f"base_model.model.{count.module}"]
        delta = layer.deltas[count.adapter]
        assert count.entries == delta.weight.numel() and count.biases == delta.bias.numel()
        assert (count.neurons, count.weights) == (layer.out_features, layer.base_matrix().numel())
    for adapter in report.adapters:
        assert report.entries(adapter) == len(held(model, adapter))
        assert sum(report.entries(adapter, block) for block in report.blocks) == report.entries(adapter)
        assert sum(report.distribution(adapter).values()) == pytest.approx(1)


def test_overlaps_are_common_positions(model):
    report = selection_report(model)
    groups = [("default", "second"), ("default", "third"), ("second", "third"), ("default", "second", "third")]
    assert [overlap.adapters for overlap in report.overlaps] == groups
    for overlap in report.overlaps:
        sets = [held(model, adapter) for adapter in overlap.adapters]
        assert overlap.shared == len(set.intersection(*sets)) and overlap.union == len(set.union(*sets))
        assert overlap.share == pytest.approx(overlap.shared * len(sets) / sum(map(len, sets)))
    assert 0 < report.overlaps[0].shared < report.overlaps[0].union


def test_an_adapter_overlaps_with_itself_whole(tiny):
    model = add(adapted(tiny("gpt2"), "psn by k"), "again", "psn by k")
    (overlap,) = selection_report(model).overlaps
    assert overlap.share == 1 and overlap.shared == overlap.union


def test_blocks_are_the_items_of_module_lists(model, tiny):
    assert selection_report(model).blocks == ["vit.embeddings.patch_embeddings", "vit.layers.0", "vit.layers.1"]
    assert selection_report(adapted(tiny("gpt2"), "neuroada")).blocks == ["transformer.h.0", "transformer.h.1"]


def test_chosen_adapters_only(model):
    report = selection_report(model, ["third"])
    assert report.adapters == ["third"] and not report.overlaps
    with pytest.raises(ValueError, match=r"adapters=\['fourth'\](.|\n)*'default', 'second', 'third'"):
        selection_report(model, ["fourth"])


def test_without_sparse_adapters(tiny):
    with pytest.raises(ValueError, match="the model has the sparse adapters"):
        selection_report(get_peft_model(tiny("vit"), LoraConfig(target_modules=["q_proj"])))


def test_unknown_entries_are_an_error(llama):
    model = inject_adapter_in_model(NeuroAdaConfig(k=2), llama, low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="not known yet: load its checkpoint"):
        selection_report(model)


def test_table_names_every_layer(model):
    text = str(selection_report(model))
    assert all(name.removeprefix("base_model.model.") in text for name in layers_of(model))
    assert "default and second" in text


@pytest.mark.parametrize("adapters", [None, ["default"]], ids=["three", "one"])
def test_figure_is_saved_with_its_data(model, tmp_path, adapters):
    pytest.importorskip("matplotlib")
    report = selection_report(model, adapters)
    image, data = report.save(tmp_path / "new")
    assert image.read_bytes().startswith(b"\x89PNG")
    assert json.loads(data.read_text()) == json.loads(json.dumps(report.as_dict()))
    bars = report.plot().axes[0].patches
    heights = [share * 100 for adapter in report.adapters for share in report.distribution(adapter).values()]
    assert [bar.get_height() for bar in bars] == pytest.approx(heights)


def test_model_of_plain_modules():
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), PSNConfig(k=2, target_modules=["0"]))
    (count,) = selection_report(model).counts
    assert (count.module, count.block, count.entries) == ("0", "0", 6)
