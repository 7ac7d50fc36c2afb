"""The quick start on a language model: texts from any source, and a run with TRL on files of this machine."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from pathlib import Path

import datasets
import pytest
import torch
from _quickstart import texts
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


WORDS = [
    "a",
    "the",
    "red",
    "blue",
    "cat",
    "dog",
    "sees",
    "eats",
    "big",
    "small",
    "house",
    "tree",
    "and",
    "then",
    "over",
]


def sentences(count: int = 40) -> list[str]:
    generator = random.Random(0)
    return [" ".join(generator.choices(WORDS, k=generator.randint(4, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 40 sentences in every form that `--dataset` takes."""
    folder = tmp_path_factory.mktemp("corpora")
    table = datasets.Dataset.from_dict({"text": sentences(), "number": list(range(40))})
    table.to_csv(folder / "file.csv")
    table.to_json(folder / "file.jsonl")
    table.save_to_disk(folder / "saved")
    datasets.DatasetDict(train=table).save_to_disk(folder / "saved_splits")
    (folder / "folder").mkdir()
    table.to_json(folder / "folder" / "train.jsonl")
    return folder


def dataset_options(dataset: Path, **changes) -> Namespace:
    values = {"dataset": str(dataset), "dataset_config": None, "split": "train", "text_column": "text"}
    return Namespace(**(values | {"max_examples": 1000} | changes))


@pytest.mark.parametrize("source", ["file.csv", "file.jsonl", "saved", "saved_splits", "folder"])
def test_texts_of_any_source_are_split_into_disjoint_parts(corpora: Path, source: str) -> None:
    parts = texts.load(dataset_options(corpora / source))
    assert parts.sizes() == {"train": 32, "validation": 4, "test": 4}
    found = [example["text"] for part in vars(parts).values() for example in part]
    assert sorted(found) == sorted(sentences())


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("saved", {"text_column": "story"}, "--text-column story .* text, number"),
        ("saved_splits", {"split": "dev"}, "--split dev .* train"),
        ("saved", {"max_examples": 3}, "too few"),
    ],
)
def test_unusable_texts_are_named(corpora: Path, source: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        texts.load(dataset_options(corpora / source, **changes))


def language_model(folder: Path) -> None:
    """A Llama of two layers with a tokenizer that knows the words of the sentences."""
    special = ["<unk>", "<pad>", "</s>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", model_max_length=64
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=1,
        bos_token_id=None,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.mark.slow
def test_language_mode_trains_neuroada_and_lora_on_local_files(tmp_path: Path, corpora: Path, run_script) -> None:
    language_model(tmp_path / "model")
    data = ["--model", str(tmp_path / "model"), "--dataset", str(corpora / "file.csv")]
    text, written = run_script("quickstart", "--smoke", *data, "--trials", "2")
    assert "eval loss" in text
    assert [entry["name"] for entry in written["rows"]] == ["neuroada", "lora"]
    assert all(len(entry["search"]["trials"]) == 2 for entry in written["rows"])
    assert all(check["passed"] for check in written["checks"])
    assert str(tmp_path) not in json.dumps(written)
