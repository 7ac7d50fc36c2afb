"""What is added, combined, swapped or loaded while another adapter is merged belongs to the original base weight."""

import pytest
import torch
from peft import PeftModel

from peft_ext import hotswap_adapter
from tests.contract._untouched import Untouched
from tests.tuners.neuroada._common import adapted, add, logits


OPTIONS = {"k": 1, "target_modules": ["q_proj", "down_proj"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["added", "loaded"])
def test_added_or_loaded(tiny, ids, tmp_path, how, dtype):
    model = adapted(tiny("llama").to(dtype), **OPTIONS)
    model.merge_adapter()
    expected = adapted(tiny("llama").to(dtype), seed=2, **OPTIONS)
    if how == "added":
        add(model, "b", seed=2, **OPTIONS)
    else:
        expected.save_pretrained(tmp_path)
        model.load_adapter(tmp_path, "b")
    model.set_adapter("b")
    assert torch.equal(logits(model, ids), logits(expected, ids))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama").to(dtype), tmp_path / "b")
    assert torch.equal(logits(loaded, ids), logits(expected, ids))


def test_combined(tiny, ids, tmp_path):
    model = add(adapted(tiny("llama"), **OPTIONS), "b", **OPTIONS)
    model.merge_adapter(["default"])
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "c")
    model.set_adapter("c")
    expected = logits(model, ids)
    model.save_pretrained(tmp_path, selected_adapters=["c"])
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "c")
    assert torch.equal(logits(loaded, ids), expected)


def test_swapped_for_one_of_the_same_base(tiny, ids, tmp_path):
    expected = adapted(tiny("llama"), seed=3, **OPTIONS)
    expected.save_pretrained(tmp_path)
    model = add(adapted(tiny("llama"), **OPTIONS), "b", **OPTIONS)
    model.merge_adapter(["default"])
    hotswap_adapter(model, str(tmp_path), "b")
    model.unmerge_adapter()
    model.set_adapter("b")
    assert torch.equal(logits(model, ids), logits(expected, ids))


def test_swapped_for_one_of_another_base(tiny, tmp_path):
    adapted(tiny("llama"), k=2).save_pretrained(tmp_path)
    other = tiny("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1.5)
    model = add(adapted(other, k=2), "merged", k=1)
    model.merge_adapter(["merged"])
    with Untouched(model), pytest.raises(ValueError, match="another base model"):
        hotswap_adapter(model, str(tmp_path))


def test_refused_file_leaves_the_merge(tiny, ids, tmp_path):
    adapted(tiny("llama"), **OPTIONS).save_pretrained(tmp_path)
    other = tiny("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1.5)
    model = adapted(other, **OPTIONS)
    model.merge_adapter()
    expected = logits(model, ids)
    with pytest.raises(ValueError, match="another base model"):
        model.load_adapter(tmp_path, "b")
    assert model.base_model.model.model.layers[0].self_attn.q_proj.merged_adapters == ["default"]
    assert torch.equal(logits(model, ids), expected)
