"""The adapter methods of transformers models themselves, without a `PeftModel`."""

import pytest
import torch

from peft_ext import NeuroAdaConfig
from tests.contract._common import fill, layers_of
from tests.contract._untouched import Untouched
from tests.tuners.neuroada._common import logits


def test_refused_adapter_leaves_the_others(llama, ids):
    llama.add_adapter(NeuroAdaConfig(k=1), adapter_name="good")
    expected = logits(fill(llama, "good"), ids)
    with Untouched(llama), pytest.raises(TypeError, match="embed_tokens"):
        llama.add_adapter(NeuroAdaConfig(target_modules=["embed_tokens"]), adapter_name="bad")
    assert set(llama.peft_config) == {"good"}
    assert torch.equal(logits(llama, ids), expected)


def test_refused_first_adapter_can_be_put_right(llama, ids):
    with Untouched(llama), pytest.raises(TypeError, match="embed_tokens"):
        llama.add_adapter(NeuroAdaConfig(target_modules=["embed_tokens"]))
    llama.add_adapter(NeuroAdaConfig(k=1))
    assert layers_of(llama)
