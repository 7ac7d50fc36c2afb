"""What the tests of NeuroAda share beside what those of every method do: models by its options."""

import torch
from peft import get_peft_model

from peft_ext import NeuroAdaConfig
from tests.contract._common import fill


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HALF_TYPES = [torch.bfloat16, torch.float16]


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def adapted(base, seed=1, **options):
    """A base model with one adapter in it, with values."""
    return fill(get_peft_model(base, NeuroAdaConfig(**options)).eval(), seed=seed)


def add(model, adapter_name, seed=2, **options):
    """Another adapter, with values, on an adapted model."""
    model.add_adapter(adapter_name, NeuroAdaConfig(**options))
    return fill(model, adapter_name, seed=seed)
