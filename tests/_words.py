"""A tiny language model whose tokens are words, saved with its tokenizer."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast


SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def make_tokenizer(words, chat_template=None):
    """A tokenizer that splits at blanks."""
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def save_tokenizer(folder, words, chat_template=None):
    """Save such a tokenizer; returns the size of its vocabulary."""
    tokenizer = make_tokenizer(words, chat_template)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_language_model(folder, words, chat_template=None, **options):
    """Save a Llama of two layers and its tokenizer."""
    folder.mkdir(exist_ok=True)
    size = save_tokenizer(folder, words, chat_template)
    config = LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
