"""TRL's trainer with sparse adapters on two text tasks."""

import pytest
import torch

from peft_ext import NeuroAdaConfig
from tests.mtl._models import assert_same_weights


trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'peft-ext[trl]'")
datasets = pytest.importorskip("datasets")

WORDS = ["the", "a", "cat", "dog", "bird", "sees", "hears", "likes", "small", "big", "house", "tree", "and"]


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def texts(seed, count=24):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    picks = [torch.randint(len(WORDS), (n,), generator=generator).tolist() for n in lengths]
    return datasets.Dataset.from_list([{"text": " ".join(WORDS[i] for i in row)} for row in picks])


def run(folder, model, tokenizer, train=True, **options):
    from peft_ext.mtl import MTLSFTConfig, MTLSFTTrainer

    defaults = {
        "per_device_train_batch_size": 12,
        "max_steps": 4,
        "learning_rate": 3e-2,
        "max_length": 16,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "shuffle_dataset": False,
    }
    peft_config = NeuroAdaConfig(task_type="CAUSAL_LM", k=2)
    result = MTLSFTTrainer(
        model=model,
        args=MTLSFTConfig(output_dir=str(folder), **{**defaults, **options}),
        train_dataset={"short": texts(1), "long": texts(2)},
        eval_dataset={"short": texts(3, 6), "long": texts(4, 6)},
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    if train:
        result.train()
    return result


@pytest.mark.parametrize("method", ["joint", "pcgrad"])
def test_neuroada_accumulates_exactly(tiny, tokenizer, tmp_path, method):
    whole = run(tmp_path, tiny("llama"), tokenizer, mtl_method=method)
    pieces = run(
        tmp_path,
        tiny("llama"),
        tokenizer,
        mtl_method=method,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
    )
    assert_same_weights(pieces.model, whole.model, 2e-6)
    values = [p for n, p in whole.model.named_parameters() if p.requires_grad]
    assert sum(p.numel() for p in values) == sum(len(r) * 0 + g.numel() for g in values for r in [g])
    assert all(whole._gradients.shared)
    logs = whole.state.log_history[0]
    assert {"task_loss/short", "task_loss/long", "gradient_conflict/cos/short__long", "mean_token_accuracy"} <= set(
        logs
    )


def test_evaluation_reports_every_task(tiny, tokenizer, tmp_path):
    metrics = run(tmp_path, tiny("llama"), tokenizer).evaluate()
    assert {"eval_short_loss", "eval_long_loss"} <= set(metrics)


def test_famo_trains_and_counts_tokens_once(tiny, tokenizer, tmp_path):
    joint = run(tmp_path, tiny("llama"), tokenizer)
    famo = run(tmp_path, tiny("llama"), tokenizer, mtl_method="famo", noise_floor_steps=2)
    tokens = [[entry["num_tokens"] for entry in r.state.log_history if "num_tokens" in entry] for r in (joint, famo)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("option", ["packing", "padding_free"])
def test_packed_batches_are_refused(tiny, tokenizer, tmp_path, option):
    with pytest.raises(ValueError, match="into one row"):
        run(tmp_path, tiny("llama"), tokenizer, train=False, mtl_method="pcgrad", **{option: True})
