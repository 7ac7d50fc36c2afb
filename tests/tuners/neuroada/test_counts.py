"""Parameter counts of the thesis (chapter 5) and the size of a file, on the shapes of the real models."""

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_ext import NeuroAdaConfig
from tests.contract._common import layers_of
from tests.tuners.neuroada._common import SEVEN


SHAPES = {
    "LLaMA-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "LLaMA-13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "Llama-3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def on_meta(name):
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SHAPES[name]))


@pytest.mark.parametrize(
    ("name", "k", "printed"),
    [
        ("LLaMA-7B", 1, "0.020"),
        ("LLaMA-7B", 20, "0.404"),
        ("LLaMA-13B", 1, "0.016"),
        ("LLaMA-13B", 20, "0.327"),
        ("Llama-3-8B", 1, "0.017"),
        ("Llama-3-8B", 20, "0.343"),
    ],
)
def test_trained_share_is_the_thesis_s(name, k, printed):
    base = on_meta(name)
    total = base.num_parameters()
    model = get_peft_model(base, NeuroAdaConfig(k=k, target_modules=SEVEN))
    trained, _ = model.get_nb_trainable_parameters()
    assert f"{100 * trained / total:.3f}" == printed
    assert len(layers_of(model)) == 7 * SHAPES[name]["num_hidden_layers"]


def test_defaults_train_the_same_modules():
    explicit = get_peft_model(on_meta("LLaMA-7B"), NeuroAdaConfig(target_modules=SEVEN))
    assert layers_of(get_peft_model(on_meta("LLaMA-7B"), NeuroAdaConfig())).keys() == layers_of(explicit).keys()


def test_model_without_weights_says_what_to_do(ids):
    """Nothing can be ranked on the meta device; the adapter must be told its entries before it is used."""
    model = get_peft_model(on_meta("LLaMA-7B"), NeuroAdaConfig(k=1))
    layer = next(iter(layers_of(model).values()))
    assert layer.deltas["default"].pending
    with pytest.raises(RuntimeError, match="Load the checkpoint"):
        layer.get_delta_weight("default")


def with_values(name, **options):
    """An adapted model of these shapes whose base stays on the meta device and whose adapter has numbers."""
    model = get_peft_model(on_meta(name), NeuroAdaConfig(target_modules=SEVEN, **options))
    for layer in layers_of(model).values():
        delta = layer.deltas["default"]
        rows, k = delta.weight.shape
        dtype = getattr(torch, options.get("values_dtype") or "float32")
        delta.weight = nn.Parameter(torch.randn(rows, k, dtype=dtype))
        delta.fingerprint = torch.ones(delta.fingerprint.shape, dtype=torch.int64)
        delta.indices = torch.randint(layer.in_features, (rows, 1)).sort(1).values
    return model


@pytest.mark.parametrize(
    ("dtype", "bytes_per_entry", "megabytes"), [("float32", 6.1, 9.0), ("bfloat16", 4.1, 6.0), ("float16", 4.1, 6.0)]
)
def test_file_of_a_7b_model(tmp_path, dtype, bytes_per_entry, megabytes):
    model = with_values("LLaMA-7B", k=1, values_dtype=dtype)
    entries, _ = model.get_nb_trainable_parameters()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    size = path.stat().st_size
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
        saved = sum(file.get_tensor(key).numel() for key in keys if key.endswith(".weight"))
        types = {file.get_tensor(key).dtype for key in keys if key.endswith(".indices")}
    assert len(keys) == 3 * 224 and saved == entries == 1_359_872
    assert types == {torch.uint16}
    assert size <= bytes_per_entry * entries
    assert size <= megabytes * 1e6
