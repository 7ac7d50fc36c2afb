"""What is active, disabled, trainable or in training mode stays so through a conversion."""

import pytest
from peft import ShiraConfig

from peft_ext import convert
from tests.conversion._common import PEERS, peft_adapted
from tests.tuners.neuroada._common import logits


pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


def disable(model):
    model.base_model.disable_adapter_layers()


def disable_one(model):
    model.base_model.model.model.layers[0].self_attn.q_proj.enable_adapters(False)


def activate_the_second(model):
    model.set_adapter("second")


def activate_both(model):
    model.base_model.set_adapter(["default", "second"])


def freeze(model):
    model.set_adapter("default", inference_mode=True)


def freeze_one(model):
    model.base_model.model.model.layers[1].self_attn.q_proj.shira_weight["default"].requires_grad_(False)


def train_an_inactive_one(model):
    model.set_requires_grad("second")


def train_a_part_of_the_base(model):
    model.base_model.model.model.norm.requires_grad_(True)


def train_mode(model):
    model.train()
    model.base_model.model.model.norm.eval()


def switches(model):
    """All that can be asked of a model, by names that PEFT's layers and ours share."""
    status = model.get_model_status()
    trainable, modes = {}, {}
    for name, parameter in model.named_parameters():
        name = name.removesuffix(".weight").replace("neuroada_delta", "values").replace("shira_weight", "values")
        trainable[name] = parameter.requires_grad
    for name, module in model.named_modules():
        if "neuroada_delta" not in name and "shira_weight" not in name:
            modes[name] = module.training
    return {
        "enabled": status.enabled,
        "active": (status.active_adapters, model.active_adapters, model.active_adapter),
        "layers": {s.name: (s.enabled, sorted(s.active_adapters), s.requires_grad) for s in model.get_layer_status()},
        "trainable": trainable,
        "modes": modes,
    }


@pytest.mark.parametrize(
    "change",
    [
        disable,
        disable_one,
        activate_the_second,
        activate_both,
        freeze,
        freeze_one,
        train_an_inactive_one,
        train_a_part_of_the_base,
        train_mode,
    ],
)
def test_switches_stay(tiny, change):
    model = peft_adapted(tiny("llama"), modules_to_save=["lm_head"])
    model.add_adapter("second", ShiraConfig(r=1, target_modules=["q_proj", "o_proj"], init_weights=False))
    plain = switches(model)
    change(model)
    expected = switches(model)
    assert expected != plain
    assert switches(convert(model)) == expected


@PEERS
def test_disabled_adapters_compute_the_base_until_enabled(tiny, ids, peer):
    base = tiny("llama")
    expected = logits(base, ids)
    model = peft_adapted(base, peer)
    with_adapter = logits(model, ids)
    disable(model)
    converted = convert(model)
    assert (logits(converted, ids) == expected).all()
    converted.base_model.enable_adapter_layers()
    assert (logits(converted, ids) - with_adapter).abs().max() < 1e-5


def test_leaving_a_disabled_context_enables_the_converted_adapter(tiny, ids):
    model = peft_adapted(tiny("llama"))
    with_adapter = logits(model, ids)
    with model.disable_adapter():
        without = logits(model, ids)
        converted = convert(model)
        assert (logits(converted, ids) == without).all()
    assert (logits(converted, ids) - with_adapter).abs().max() < 1e-5


@pytest.mark.parametrize("trainable", [True, False])
def test_loaded_for_training_or_not(tiny, tmp_path, trainable):
    peft_adapted(tiny("llama"), modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    converted = convert(tmp_path, tiny("llama").train(), is_trainable=trainable)
    flags = {name: p.requires_grad for name, p in converted.named_parameters()}
    assert {f for name, f in flags.items() if "neuroada_delta" in name or "modules_to_save" in name} == {trainable}
    assert not any(f for name, f in flags.items() if "neuroada_delta" not in name and "modules_to_save" not in name)
    assert converted.training == trainable
    assert converted.peft_config["default"].inference_mode != trainable
