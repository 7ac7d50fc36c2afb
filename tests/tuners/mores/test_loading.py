"""Files that cannot be loaded are refused, and the model is afterwards as it was."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests._models.vision_language import build, inputs
from tests.tuners.mores._common import adapted, assert_equal_bits, bits, layers_of, logits


PREFIX = "base_model.model.model.language_model.layers.0.steering.mores_steering"


def edit(change):
    """A damage to the tensors, saved without the checksum, as another program would."""

    def damage(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def flip(folder):
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def options(**changes):
    def damage(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


DAMAGES = {
    "cut short": (cut, "not a whole safetensors file"),
    "a bit flipped": (flip, "checksum"),
    "a tensor missing": (edit(lambda t: t.pop(f"{PREFIX}.weight")), "lacks"),
    "a tensor too many": (edit(lambda t: t.update({f"{PREFIX}.raw_down": torch.ones(32, 2)})), "no place"),
    "another shape": (edit(lambda t: t.update({f"{PREFIX}.weight": torch.ones(3, 32)})), "shape"),
    "not finite": (edit(lambda t: t[f"{PREFIX}.bias"].fill_(float("nan"))), "not finite"),
    "infinite": (edit(lambda t: t[f"{PREFIX}.raw_up"][0].fill_(float("inf"))), "not finite"),
    "whole numbers": (edit(lambda t: t.update({f"{PREFIX}.weight": t[f"{PREFIX}.weight"].int()})), "floating-point"),
    "a frozen tensor": (
        edit(lambda t: t.update({"base_model.model.model.language_model.norm.weight": torch.ones(32)})),
        "norm.weight', which is no part of the adapter",
    ),
    "no full rank": (edit(lambda t: t[f"{PREFIX}.raw_up"].fill_(1.0)), "dependent columns"),
    "another rank": (options(rank=3), "shape"),
    "another layer": (options(target_modules=["model.language_model.layers.7"]), "no place that MoReS can steer"),
}


@pytest.fixture(params=DAMAGES.values(), ids=DAMAGES)
def damaged(request, tmp_path):
    damage, message = request.param
    adapted().save_pretrained(tmp_path)
    damage(tmp_path)
    return tmp_path, message


def state(model):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    return {name: type(m) for name, m in model.named_modules()}, trainable, hooks


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_first_adapter(damaged, low_cpu_mem_usage):
    folder, message = damaged
    base = build()
    before = state(base)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert state(base) == before
    assert torch.equal(logits(base, inputs()), logits(build(), inputs()))


def test_second_adapter(damaged):
    folder, message = damaged
    model = adapted()
    expected, before = logits(model, inputs()), bits(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(folder, adapter_name="other")
    assert set(model.peft_config) == {"default"}
    assert all(set(layer.mores_steering) == {"default"} for layer in layers_of(model).values())
    assert_equal_bits(bits(model), before)
    assert torch.equal(logits(model, inputs()), expected)


def test_through_transformers(damaged):
    folder, message = damaged
    base = build()
    before = state(base)
    with pytest.raises(ValueError, match=message):
        base.load_adapter(str(folder))
    assert state(base) == before
    good = folder / "good"
    adapted().save_pretrained(good)
    base.load_adapter(str(good))
    assert torch.equal(logits(base, inputs()), logits(adapted(), inputs()))


@pytest.mark.parametrize("way", ["peft", "transformers"])
def test_tensors_that_belong_to_nothing_are_named_and_ignored(tmp_path, way):
    adapted().save_pretrained(tmp_path)
    edit(lambda tensors: tensors.update(foo=torch.ones(2)))(tmp_path)
    base = build()
    with pytest.warns(UserWarning, match="belong to nothing in this model and are ignored: 'foo'"):
        if way == "peft":
            base = PeftModel.from_pretrained(base, tmp_path)
        else:
            base.load_adapter(str(tmp_path))
    assert torch.equal(logits(base, inputs()), logits(adapted(), inputs()))
