"""What docs/how-to/experts.md says of PEFT's LoRA on `target_parameters`, and of NeuroAda beside it."""

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter as peft_hotswap_adapter

from peft_ext import NeuroAdaConfig, hotswap_adapter
from tests._models.experts import run, tiny, token_ids

from .test_trainers import dpo, preferences, tokenizer  # noqa: F401 (fixtures)


pytestmark = pytest.mark.skipif(
    not peft.__version__.startswith("0.21.2"), reason="the page speaks of PEFT 0.21.2: check it and both sides here"
)
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = token_ids(4)


def lora(parameters=PARAMETERS, **options):
    return LoraConfig(r=2, target_modules=[], target_parameters=parameters, task_type="CAUSAL_LM", **options)


def neuroada(parameters=PARAMETERS):
    return NeuroAdaConfig(k=2, target_parameters=parameters, task_type="CAUSAL_LM")


METHODS = pytest.mark.parametrize("config", [lora, neuroada])


def two_adapters(config, dtype=torch.float32):
    model = get_peft_model(tiny().to(dtype), config()).eval()
    model.add_adapter("other", config())
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora" in name or "delta" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def logits(model, **inputs):
    with torch.no_grad():
        return run(model, input_ids=IDS, **inputs)


@METHODS
def test_both_switch_delete_save_and_swap_adapters(config, tmp_path):
    model = two_adapters(config)
    expected = {}
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected.setdefault(name, logits(model)))
    assert not torch.equal(expected["default"], expected["other"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(logits(loaded), expected["default"])
    swap = hotswap_adapter if config is neuroada else peft_hotswap_adapter
    swap(loaded, tmp_path / "other", "default")
    torch.testing.assert_close(logits(loaded), expected["other"], atol=1e-5, rtol=1e-5)
    model.delete_adapter("other")
    assert torch.equal(logits(model), expected["default"])


def test_lora_runs_in_dpo_with_a_second_adapter_as_the_reference_too(tmp_path, preferences, tokenizer):  # noqa: F811
    """As NeuroAda does (`test_trainers.py`)."""
    trainer, _ = dpo(tiny(), tmp_path, preferences, tokenizer, peft_config=lora())
    trainer.save_model(tmp_path / "first")
    before = logits(trainer.model.eval())
    model = PeftModel.from_pretrained(tiny(), tmp_path / "first", is_trainable=True)
    trainer, _ = dpo(model, tmp_path, preferences, tokenizer)
    model.eval().set_adapter("ref")
    assert torch.equal(logits(model), before)


MIXED = {"adapter_names": ["default", "other", "__base__", "default"]}
VERBS = {
    "mixed batches": lambda model, config: logits(model, **MIXED),
    "weighted": lambda model, config: model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum"),
    "other parameters": lambda model, config: model.add_adapter("third", config(PARAMETERS[1:])),
}


@pytest.mark.parametrize("verb", VERBS)
def test_lora_refuses_what_neuroada_does(verb):
    VERBS[verb](two_adapters(neuroada), neuroada)
    with pytest.raises(ValueError, match="(?i)not support|must target the same"):
        VERBS[verb](two_adapters(lora), lora)


@METHODS
def test_only_neuroada_restores_every_bit(config):
    model = two_adapters(config, torch.bfloat16)
    bits = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.merge_adapter()
    model.unmerge_adapter()
    changed = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, bits[key])]
    assert bool(changed) == (config is lora)
