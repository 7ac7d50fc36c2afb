"""Tiny models, built from configs and saved once, so that they can be loaded as pretrained ones. No network."""

import copy
import functools
import gc

import jinja2
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    ViTConfig,
)


VOCABULARY = 64

# Llama's down_proj has more than 256 inputs and its other layers fewer: two widths of indices in one file.
_CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=272,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.1,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.1,
    ),
    "bert": BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=3,
        initializer_range=0.1,
    ),
    "vit": ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
        initializer_range=0.1,
    ),
}
_CLASSES: dict[str, type[AutoModel]] = {
    "llama": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "bert": AutoModelForSequenceClassification,
    "vit": AutoModelForImageClassification,
}


# Every save makes a model card of the same template, whose compilation takes longer than all the rest of saving.
jinja2.Template = functools.cache(jinja2.Template)


@pytest.fixture(autouse=True, scope="module")
def _imported_objects_are_not_searched_for_garbage():
    """Accelerate collects garbage at the start of every training: 0.3 s for all that libraries hold, else 0.01 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """Function: name of a tiny model to the folder that it was saved in."""
    folder = tmp_path_factory.mktemp("models")
    # All at once, before any test runs: some tests break the functions that save.
    for name, config in _CONFIGS.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            _CLASSES[name].from_config(config).save_pretrained(folder / name)
    return lambda name: str(folder / name)


@pytest.fixture(scope="session")
def tiny(model_dir):
    """Function: name of a tiny model (`llama`, `gpt2`, `bert`, `vit`) to a new copy of it, in eval mode."""
    loaded = {}

    def copy_of(name, dtype=torch.float32):
        if name not in loaded:
            loaded[name] = _CLASSES[name].from_pretrained(model_dir(name))
        return copy.deepcopy(loaded[name]).to(dtype)

    return copy_of


@pytest.fixture
def llama(tiny):
    return tiny("llama")


@pytest.fixture(scope="session")
def inputs_of():
    """Function: name of a tiny model to inputs for it, a batch of three."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=generator)
    pixels = torch.randn(3, 1, 8, 8, generator=generator)

    def inputs(name, dtype=torch.float32):
        if name == "vit":
            return {"pixel_values": pixels.to(dtype)}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return inputs


@pytest.fixture(scope="session")
def ids(inputs_of):
    """Token numbers, `[3, 7]`."""
    return inputs_of("llama")["input_ids"]
