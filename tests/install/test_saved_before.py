"""Adapters that an earlier version wrote load, compute what they did, and are written again as they were."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.install._saved_before import CONFIGS, IDS, base


FOLDER = Path(__file__).parent / "saved_before"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["ordinary", "low memory"])
def test_an_adapter_of_an_earlier_version_computes_what_it_did(name, low_cpu_mem_usage, tmp_path):
    model = PeftModel.from_pretrained(base(), FOLDER / name, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    with torch.no_grad():
        logits = model(IDS).logits
        assert not torch.allclose(logits, base()(IDS).logits, atol=1e-3)
    expected = torch.tensor(json.loads((FOLDER / name / "logits.json").read_text()))
    torch.testing.assert_close(logits, expected)
    model.save_pretrained(tmp_path)
    before, now = (load_file(folder / "adapter_model.safetensors") for folder in (FOLDER / name, tmp_path))
    assert before.keys() == now.keys()
    for key, tensor in before.items():
        assert tensor.dtype == now[key].dtype and torch.equal(tensor, now[key]), key
