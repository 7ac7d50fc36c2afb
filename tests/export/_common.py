"""Models and adapters in folders, as the commands take them."""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    CLIPVisionConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from peft_ext import NeuroAdaConfig


TEXT = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
PATCHES = {"image_size": 16, "patch_size": 8}
MODELS = {
    "llama": lambda: AutoModelForCausalLM.from_config(TEXT),
    "gpt2": lambda: AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ),
    "bert": lambda: AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=64, num_labels=3, **SMALL)),
    "mixtral": lambda: AutoModelForCausalLM.from_config(
        MixtralConfig(vocab_size=64, num_local_experts=2, num_key_value_heads=2, **SMALL)
    ),
    "gpt-oss": lambda: AutoModelForCausalLM.from_config(  # which keeps all experts in one tensor, neurons as columns
        GptOssConfig(vocab_size=64, num_local_experts=2, num_key_value_heads=2, head_dim=8, **SMALL)
    ),
    "llava": lambda: LlavaForConditionalGeneration(  # its tensors have other names in files than in the model
        LlavaConfig(
            text_config=TEXT,
            vision_config=CLIPVisionConfig(projection_dim=32, **SMALL, **PATCHES),
            image_token_index=3,
        )
    ),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SMALL, **PATCHES)),  # with an nn.MultiheadAttention
}


def saved_base(folder, name, dtype=torch.float32, **save_options):
    torch.manual_seed(0)
    MODELS[name]().to(dtype).save_pretrained(folder, **save_options)
    return folder


def loaded_base(folder, name):
    return type(MODELS[name]()).from_pretrained(folder, dtype="auto")


def saved_adapter(folder, base_folder, name, config=None, scale=0.05):
    model = get_peft_model(loaded_base(base_folder, name), config or NeuroAdaConfig(k=2))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    return folder


def merged_in_memory(folder, adapter, base_folder, name):
    model = PeftModel.from_pretrained(loaded_base(base_folder, name), adapter)
    model.merge_and_unload().save_pretrained(folder)
    return folder


def tensors_of(folder):
    return {key: tensor for file in Path(folder).glob("*.safetensors") for key, tensor in load_file(file).items()}


def assert_same_tensors(one, other):
    one, other = tensors_of(one), tensors_of(other)
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]), key


def assert_same_files(one, other):
    names = sorted(path.name for path in Path(one).glob("*.safetensors"))
    assert names == sorted(path.name for path in Path(other).glob("*.safetensors"))
    for name in names:
        assert (Path(one) / name).read_bytes() == (Path(other) / name).read_bytes(), name
