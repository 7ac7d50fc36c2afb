"""Several adapters on one model: what does not go together, and the dtype of values."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_ext import NeuroAdaConfig
from tests.contract._common import fill, layers_of
from tests.tuners.neuroada._common import SEVEN, adapted, add


def test_all_linear_for_a_second_adapter(llama):
    model = adapted(llama, k=1, target_modules=["q_proj"])
    add(model, "other", k=1, target_modules="all-linear")
    assert sum("other" in layer.deltas for layer in layers_of(model).values()) == 2 * len(SEVEN)


def test_two_adapters_that_train_biases_are_refused(tiny):
    model = get_peft_model(tiny("bert"), NeuroAdaConfig(bias="all"))
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("other", NeuroAdaConfig(bias="neuroada_only"))
    assert set(model.peft_config) == {"default"}


def test_adapters_of_other_methods_beside_ours_are_refused_by_peft(llama):
    model = adapted(llama, k=2)
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
    assert set(model.peft_config) == {"default"}


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("autocast", [True, False])
def test_dtype_of_values(tiny, dtype, autocast):
    config = NeuroAdaConfig(values_dtype=dtype)
    model = get_peft_model(tiny("llama", torch.bfloat16), config, autocast_adapter_dtype=autocast)
    expected = torch.float32 if autocast else torch.bfloat16
    if dtype is not None:
        expected = getattr(torch, dtype)
    assert {layer.deltas["default"].weight.dtype for layer in layers_of(model).values()} == {expected}


@pytest.mark.parametrize("values", ["bfloat16", "float16"])
def test_values_of_half_the_bytes_train_on_a_wide_base(llama, ids, values):
    model = fill(get_peft_model(llama, NeuroAdaConfig(k=2, values_dtype=values)))
    loss = model(ids, labels=ids).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {getattr(torch, values)}
