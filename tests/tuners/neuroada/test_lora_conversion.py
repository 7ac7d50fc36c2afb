"""PEFT's conversion to LoRA."""

import torch
from peft import PeftModel, save_as_lora

from tests.contract._common import assert_equal_bits, base_bits
from tests.tuners.neuroada._common import adapted, logits


def test_lora_of_full_rank_is_the_same_model(tiny, ids, tmp_path):
    model = adapted(tiny("llama"), k=2, task_type="CAUSAL_LM")
    expected, plain, bits = logits(model, ids), logits(tiny("llama"), ids), base_bits(model)
    save_as_lora(tmp_path, model, rank=32)
    converted = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert converted.active_peft_config.peft_type.value == "LORA"
    torch.testing.assert_close(logits(converted, ids), expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(plain, expected, atol=1e-2)
    assert_equal_bits(base_bits(model), bits)
    assert torch.equal(logits(model, ids), expected)
