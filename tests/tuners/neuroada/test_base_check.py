"""An adapter belongs to the base model that it was made for: any other is refused before it is touched."""

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from tests.tuners.neuroada._common import Untouched, adapted, logits


@pytest.fixture
def base(tiny):
    return tiny("llama").requires_grad_(False)


@pytest.fixture
def other_base(llama):
    torch.manual_seed(1)
    return LlamaForCausalLM(llama.config).eval().requires_grad_(False)


@pytest.fixture
def adapter(tiny, tmp_path):
    adapted(tiny("llama"), k=2).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_base(other_base, adapter, dtype, low_cpu_mem_usage):
    base = other_base.to(dtype)
    with Untouched(base), pytest.raises(ValueError, match="made for another base model.*q_proj.*trained on"):
        PeftModel.from_pretrained(base, adapter, low_cpu_mem_usage=low_cpu_mem_usage)


def test_another_base_with_an_adapter_of_its_own(other_base, adapter, ids):
    model = adapted(other_base, k=2)
    expected = logits(model, ids)
    with Untouched(model), pytest.raises(ValueError, match="made for another base model"):
        model.load_adapter(adapter, "second")
    assert torch.equal(logits(model, ids), expected)


def test_another_base_through_transformers(other_base, adapter, ids):
    with Untouched(other_base), pytest.raises(ValueError, match="made for another base model"):
        other_base.load_adapter(str(adapter))


def test_base_that_was_trained_on(base, adapter):
    """Full fine-tuning by a small step is enough to be another base."""
    for parameter in base.parameters():
        parameter.data.mul_(1 + 1e-6)
    with Untouched(base), pytest.raises(ValueError, match="other values at the adapter's entries"):
        PeftModel.from_pretrained(base, adapter)


def _of_shape(llama, **shape):
    """A model of another shape with the weights of `llama` as far as they fit."""
    config = type(llama.config)(**{**llama.config.to_dict(), "layer_types": None, **shape})
    base = LlamaForCausalLM(config).eval().requires_grad_(False)
    shapes = {key: value.shape for key, value in base.state_dict().items()}
    fitting = {key: value for key, value in llama.state_dict().items() if shapes.get(key) == value.shape}
    base.load_state_dict(fitting, strict=False)
    return base


def test_another_width(llama, adapter):
    base = _of_shape(llama, intermediate_size=64)
    with Untouched(base), pytest.raises(ValueError, match=r"shape \(272, 2\).*\(64, 2\)"):
        PeftModel.from_pretrained(base, adapter)


@pytest.mark.parametrize("targets", [None, ["q_proj", "up_proj"]])
def test_fewer_layers(tiny, llama, tmp_path, targets):
    adapted(tiny("llama"), target_modules=targets).save_pretrained(tmp_path)
    base = _of_shape(llama, num_hidden_layers=1)
    with Untouched(base), pytest.raises(ValueError, match=r"layers\.1\."):
        PeftModel.from_pretrained(base, tmp_path)


def test_more_layers(tiny, llama, tmp_path):
    adapted(tiny("llama"), target_modules=["q_proj", "up_proj"]).save_pretrained(tmp_path)
    base = _of_shape(llama, num_hidden_layers=3)
    with Untouched(base), pytest.raises(ValueError, match=r"layers\.2\."):
        PeftModel.from_pretrained(base, tmp_path)
