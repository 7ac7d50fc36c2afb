"""The adapter methods of transformers models themselves, without a `PeftModel`."""

import pytest
import torch

from peft_ext import NeuroAdaConfig
from tests.contract._common import fill, layers_of
from tests.contract._untouched import Untouched
from tests.tuners.neuroada._common import logits


def test_state_dict_instead_of_a_folder(llama, tiny, ids):
    llama.add_adapter(NeuroAdaConfig(k=2))
    expected = logits(fill(llama), ids)
    base = tiny("llama")
    state = {key: value.clone() for key, value in llama.get_adapter_state_dict().items()}
    base.load_adapter(None, peft_config=NeuroAdaConfig(k=2), adapter_state_dict=state)
    assert torch.equal(logits(base, ids), expected)


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
