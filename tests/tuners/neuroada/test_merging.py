"""Merging into the base weights and back: every bit, in every dtype, in any order."""

import copy

import torch
from torch import nn

from tests.contract._common import assert_equal_bits, base_bits
from tests.tuners.neuroada._common import adapted, add, logits


def test_merge_and_unload_chosen_adapters(llama, ids):
    model = add(adapted(llama, k=2), "b", k=3)
    model.set_adapter("b")
    expected = logits(model, ids)
    merged = model.merge_and_unload(adapter_names=["b"])
    torch.testing.assert_close(logits(merged, ids), expected, atol=1e-5, rtol=1e-5)


def test_merged_model_can_be_cast_and_moved_before_unmerging(llama):
    model = adapted(llama, k=2)
    expected = base_bits(copy.deepcopy(model).to(torch.float64))
    model.merge_adapter()
    model.to(torch.float64)
    model.unmerge_adapter()
    assert_equal_bits(base_bits(model), expected)


def test_saving_while_merged_saves_the_same_adapter(llama, tmp_path, ids):
    from safetensors.torch import load_file

    model = adapted(llama, k=2)
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    before, merged = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "merged"))
    assert_equal_bits(merged, before)


def test_layer_without_the_adapter_is_left_alone():
    from peft import get_peft_model

    from peft_ext import NeuroAdaConfig

    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), NeuroAdaConfig(target_modules=["0"]))
    model.add_adapter("other", NeuroAdaConfig(target_modules=["1"], init_weights=False))
    layer = model.base_model.model[1]
    model.merge_adapter(["other"])
    assert model.base_model.model[0].merged_adapters == [] and layer.merged_adapters == ["other"]
