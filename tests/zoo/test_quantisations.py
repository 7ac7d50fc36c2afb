"""Every quantisation that computes on a CPU with every method: training, saving, loading and merging."""

import os

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from tests.contract._common import fill, logits

from ._methods import METHODS
from ._page import CELL
from ._trainers import model


bitsandbytes = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")

INPUTS = {"input_ids": torch.arange(6, 14)[None]}
QUANTISED = {
    "bitsandbytes 4-bit (NF4)": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32"
    ),
    "bitsandbytes 4-bit, double quantisation": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    ),
    "bitsandbytes 8-bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8, weights only": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    "torchao float8, weights only": lambda: TorchAoConfig(torchao.Float8WeightOnlyConfig()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(os.environ.get("ZOO") != "all", reason="for the table alone: make test-zoo")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantisation(kind, method, tmp_path, monkeypatch, record_property):
    # On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights, and crashes on layers as narrow as these.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    model().save_pretrained(tmp_path / "base")

    def load():
        where = {"device_map": {"": "cpu"}} if "bitsandbytes" in kind else {}
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=QUANTISED[kind](), dtype=torch.float32, **where
        ).eval()

    # GPS's scores come from the model before it is quantised.
    adapted = get_peft_model(load(), METHODS[method](model(), task_type="CAUSAL_LM"))
    ids = INPUTS["input_ids"]
    adapted(**INPUTS, labels=ids.masked_fill(ids < 10, -100)).loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and bool(p.grad.any()) for p in trained)
    expected = logits(fill(adapted.eval()), INPUTS)
    adapted.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path / "adapter"), INPUTS), expected)
    outcome = "trains, loads"
    if method != "MoReS":
        adapted.merge_adapter()
        # The merged layers are dense. bitsandbytes' 8-bit layers round their inputs too, the dense ones don't.
        error = (logits(adapted, INPUTS) - expected).abs().max() / expected.abs().max()
        assert error < (0.05 if "8-bit" in kind else 1e-4)
        adapted.unmerge_adapter()
        assert torch.equal(logits(adapted, INPUTS), expected)
        outcome += ", merges"
    record_property(CELL, ("quantisations", kind, method, outcome))
