"""Adapters of PEFT's own methods are saved and loaded, or refused, as they are without peft_ext."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import peft_ext  # noqa: F401  what it changes in PEFT and transformers must not be felt here


@pytest.fixture
def saved(tiny, tmp_path):
    """A folder with a LoRA, and the logits that it must give."""

    def save(ids, **kwargs):
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = get_peft_model(tiny("llama"), config).eval()
        model.save_pretrained(tmp_path, **kwargs)
        with torch.no_grad():
            return tmp_path, model(ids).logits

    return save


def _logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_lora_is_loaded_through_peft_and_transformers(tiny, saved, ids):
    folder, expected = saved(ids)
    assert torch.equal(_logits(PeftModel.from_pretrained(tiny("llama"), folder), ids), expected)
    base = tiny("llama")
    base.load_adapter(str(folder))
    assert torch.equal(_logits(base, ids), expected)


def test_pickle_of_an_old_torch_is_loaded(tiny, saved, ids):
    """Before torch 1.6 the file was no zip archive."""
    folder, expected = saved(ids, safe_serialization=False)
    path = folder / "adapter_model.bin"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    assert torch.equal(_logits(PeftModel.from_pretrained(tiny("llama"), folder), ids), expected)


def test_file_cut_short_is_reported_by_safetensors(tiny, saved, ids):
    folder, _ = saved(ids)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(SafetensorError):
        PeftModel.from_pretrained(tiny("llama"), folder)


def test_partial_lora_is_loaded_with_peft_s_warning(tiny, saved, ids):
    folder, _ = saved(ids)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        PeftModel.from_pretrained(tiny("llama"), folder)
