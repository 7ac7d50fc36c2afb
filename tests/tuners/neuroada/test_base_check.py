"""An adapter belongs to the base model that it was made for: any other is refused, and stays as it was."""

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaForCausalLM

from tests.contract._untouched import Untouched
from tests.contract._ways import as_a_second, by_peft, by_transformers, in_little_memory
from tests.tuners.neuroada._common import adapted, logits


TARGETS = ["q_proj", "up_proj"]


def _another(llama):
    torch.manual_seed(1)
    return LlamaForCausalLM(llama.config).eval()


def _trained_on(llama):
    """Full fine-tuning by a small step is enough to be another base."""
    for parameter in llama.parameters():
        parameter.data.mul_(1 + 1e-6)
    return llama


def _of_shape(**shape):
    """A model of another shape with the weights of `llama` as far as they fit."""

    def make(llama):
        base = LlamaForCausalLM(type(llama.config)(**{**llama.config.to_dict(), "layer_types": None, **shape})).eval()
        shapes = {key: value.shape for key, value in base.state_dict().items()}
        fitting = {key: value for key, value in llama.state_dict().items() if shapes.get(key) == value.shape}
        base.load_state_dict(fitting, strict=False)
        return base

    return make


# What makes another base of Llama, and what the error must say.
BASES = {
    "another": (_another, "made for another base model.*q_proj.*trained on"),
    "another in bf16": (lambda llama: _another(llama).bfloat16(), "made for another base model.*q_proj.*trained on"),
    "trained on": (_trained_on, "other values at the adapter's entries"),
    "another width": (_of_shape(intermediate_size=64), r"shape \(272, 2\).*\(64, 2\)"),
    "fewer layers": (_of_shape(num_hidden_layers=1), r"layers\.1\."),
    "more layers": (_of_shape(num_hidden_layers=3), r"layers\.2\."),
}


def _bare(base):
    return base


def _beside_lora(base):
    base.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "lora")
    return base.eval()


WAYS = {
    "first": (_bare, by_peft),
    "first with little memory": (_bare, in_little_memory),
    "second": (lambda base: adapted(base, k=2, target_modules=TARGETS), as_a_second),
    "by transformers": (_bare, by_transformers),
    "beside LoRA": (_beside_lora, lambda base, folder: base.load_adapter(str(folder), "sparse")),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", BASES)
def test_another_base(tiny, ids, tmp_path, kind, way):
    adapted(tiny("llama"), k=2, target_modules=TARGETS).save_pretrained(tmp_path)
    (make, words), (prepare, load) = BASES[kind], WAYS[way]
    model = prepare(make(tiny("llama").requires_grad_(False)))
    expected = logits(model, ids)
    with Untouched(model), pytest.raises(ValueError, match=words):
        load(model, tmp_path)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("bias", ["all", "neuroada_only"])
def test_biases_that_are_trained_stay_those_of_the_base(tiny, tmp_path, bias):
    model = adapted(tiny("bert"), target_modules=["query"], bias=bias)
    for parameter in (p for name, p in model.named_parameters() if name.endswith("bias")):
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    base = _trained_on(tiny("bert"))
    with Untouched(base), pytest.raises(ValueError, match="another base model"):
        base.load_adapter(str(tmp_path))
