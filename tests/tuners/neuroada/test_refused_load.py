"""A model of transformers after a refused `load_adapter`: as before, whatever else is adapted in it."""

import pytest
import torch
from peft import LoraConfig

from tests.tuners.neuroada._common import Untouched, adapted, logits


def _other(base):
    """The same architecture with other weights."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return base


@pytest.mark.parametrize("bias", ["all", "neuroada_only"])
def test_biases(tiny, tmp_path, bias):
    model = adapted(tiny("bert"), target_modules=["query"], bias=bias)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    base = _other(tiny("bert"))
    with Untouched(base), pytest.raises(ValueError, match="another base model"):
        base.load_adapter(str(tmp_path))


@pytest.mark.parametrize("targets", [["q_proj"], ["up_proj"], ["q_proj", "up_proj"]])
def test_beside_lora(tiny, ids, tmp_path, targets):
    adapted(tiny("llama"), target_modules=targets).save_pretrained(tmp_path)
    base = _other(tiny("llama"))
    base.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "lora")
    base.eval()
    expected = logits(base, ids)
    with Untouched(base), pytest.raises(ValueError, match="another base model"):
        base.load_adapter(str(tmp_path), "sparse")
    assert base.active_adapters() == ["lora"]
    assert torch.equal(logits(base, ids), expected)
