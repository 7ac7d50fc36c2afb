"""Tiny stand-ins for the Hub models that PEFT's tests load, written once to the cache.

PEFT's tests ask for models by Hub id. `from_pretrained` takes an id that is a folder relative to the working directory
for a local model, so running in the folder that holds these needs neither the Hub nor a patch.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


WIDTH, HEADS, VOCABULARY = 16, 4, 256
FORMAT = 4  # raise it when a model below changes, so that caches are rebuilt

# Small random weights make logits that differ by less than the tolerances of the tests; these are ten times the
# default of transformers.
SPREAD = 0.2

# PEFT's tests compare generated text without the tokens that end a sequence, so these are the padding as well.
_LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "initializer_range": SPREAD, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_BERT = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "max_position_embeddings": 128, "initializer_range": SPREAD,
}  # fmt: skip
_OPT = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 2 * WIDTH,
    "num_hidden_layers": 2, "num_attention_heads": HEADS, "max_position_embeddings": 128, "init_std": SPREAD,
    "pad_token_id": 2, "bos_token_id": 2, "eos_token_id": 2,
}  # fmt: skip
_GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": 128,
    "initializer_range": SPREAD, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 4, "d_ff": 2 * WIDTH, "num_layers": 2, "num_heads": HEADS,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_BART = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "init_std": SPREAD,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 2 * WIDTH,
    "decoder_ffn_dim": 2 * WIDTH, "max_position_embeddings": 128, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
_WHISPER = {
    "vocab_size": VOCABULARY, "num_mel_bins": 8, "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": WIDTH,
    "decoder_ffn_dim": WIDTH, "max_source_positions": 32, "max_target_positions": 32, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None,
    "begin_suppress_tokens": None,
}  # fmt: skip
_QWEN3_MOE = {**_LLAMA, "head_dim": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH}

# Hub id -> (model class, config class, arguments). The names carry their organisation since the tests do.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen/Qwen2-0.5B": ("Qwen2ForCausalLM", "Qwen2Config", {**_LLAMA, "tie_word_embeddings": True}),
    "bert-base-uncased": ("BertForSequenceClassification", "BertConfig", _BERT),
    "google/flan-t5-small": ("T5ForConditionalGeneration", "T5Config", _T5),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "hf-internal-testing/Mixtral-tiny": ("MixtralForCausalLM", "MixtralConfig", {**_LLAMA, "num_local_experts": 4}),
    "hf-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", _BERT),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM", "Gemma3TextConfig", {**_LLAMA, "head_dim": 4},
    ),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    # Tests count on its twelve layers, on embeddings of 768 numbers, and on those of the first tokens not being zero,
    # which a new model's padding is.
    "peft-internal-testing/opt-125m": (
        "OPTForCausalLM", "OPTConfig",
        {**_OPT, "num_hidden_layers": 12, "word_embed_proj_dim": 768, "pad_token_id": 8, "eos_token_id": 8},
    ),
    "peft-internal-testing/tiny-clip-text-2": (
        "CLIPTextModelWithProjection", "CLIPTextConfig",
        {**{key: value for key, value in _BERT.items() if key != "initializer_range"}, "projection_dim": WIDTH},
    ),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration", "BartConfig", _BART,
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification", "BertConfig", _BERT,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", _BERT),
    # A test lists the query_key_value of five blocks.
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM", "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": 5, "n_head": HEADS, "initializer_range": SPREAD},
    ),
    "peft-internal-testing/tiny-random-DebertaModel": (
        "DebertaModel", "DebertaConfig", {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        "DebertaV2Model", "DebertaV2Config", {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM", "GPTJConfig", {**_GPT2, "rotary_dim": 4},
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _BERT),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", _OPT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification", "RobertaConfig", _BERT,
    ),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", _BERT),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": (
        "T5ForConditionalGeneration", "T5Config", _T5,
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration", "T5Config", _T5,
    ),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "peft-internal-testing/tiny-random-Whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig", _WHISPER,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification", "LlamaConfig", {**_LLAMA, "num_labels": 1},
    ),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _QWEN3_MOE),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
}  # fmt: skip


def write_models(cache: Path) -> Path:
    """Returns the folder that holds a model for every id of `MODELS`, creating what is missing."""
    home = cache / f"models-{FORMAT}-transformers-{transformers.__version__}"
    tokenizer = None
    for model_id, (model_class, config_class, arguments) in MODELS.items():
        folder = home / model_id
        if (folder / "tokenizer.json").exists():  # written last
            continue
        tokenizer = tokenizer or _tokenizer()
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about generation settings that no test reads
            getattr(transformers, model_class)(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return home


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer that fits the models' vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    # The printable half of the bytes is all that the tests' English needs, and it leaves room for a few merges.
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 16, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([bytes(range(32, 127)).decode() + " the quick brown fox jumps over"], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
