"""Trainings of a tiny model by every trainer, each a few steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from peft_ext.mtl import MTLConfig, MTLSFTConfig, MTLSFTTrainer, MTLTrainer
from tests._words import make_tokenizer


WORDS = [f"w{number}" for number in range(24)]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}{{ eos_token }}"
STEPS = 3
COMMON = {
    "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "max_steps": STEPS, "bf16": False,
    "save_strategy": "no", "per_device_train_batch_size": 4, "learning_rate": 3e-2,
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(["user", "assistant", *WORDS], TEMPLATE)


def model(task_type: str = "CAUSAL_LM", seed: int = 0) -> torch.nn.Module:
    """A tiny Llama, always with the same weights."""
    kind = AutoModelForCausalLM if task_type == "CAUSAL_LM" else AutoModelForSequenceClassification
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=1,
    )  # fmt: skip
    return kind.from_config(config)


def _text(generator: torch.Generator, length: int) -> str:
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())


def rows(**columns: int) -> Dataset:
    """Random texts of so many words."""
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_list(
        [{name: f"{_text(generator, n)} " for name, n in columns.items()} for _ in range(4 * STEPS)]
    )


def tokens() -> Dataset:
    """Token ids with labels."""
    ids = torch.randint(6, 30, (4 * STEPS, 8), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_list(
        [{"input_ids": row, "attention_mask": [1] * 8, "labels": [-100] * 4 + row[4:]} for row in ids]
    )


def _transformers(make: Any, arguments: Any, folder: Path, adapted: Any, **options: Any) -> Any:
    return make(adapted, arguments(output_dir=str(folder), **COMMON), train_dataset=tokens(), **options)


def _mtl(folder: Path, adapted: Any) -> Any:
    parts = {"one": tokens().select(range(6)), "other": tokens().select(range(6, 12))}
    return MTLTrainer(adapted, MTLConfig(output_dir=str(folder), mtl_method="pcgrad", **COMMON), train_dataset=parts)


def _trl(name: str, data: Dataset, folder: Path, adapted: Any, **options: Any) -> Any:
    extra = options.pop("extra", {})
    arguments = getattr(trl, f"{name}Config")(output_dir=str(folder), **COMMON, **options)
    make = getattr(trl, f"{name}Trainer")
    return make(model=adapted, args=arguments, train_dataset=data, processing_class=tokenizer(), **extra)


def _mtl_sft(folder: Path, adapted: Any) -> Any:
    parts = {"short": rows(prompt=2, completion=3), "long": rows(prompt=4, completion=4)}
    arguments = MTLSFTConfig(output_dir=str(folder), mtl_method="pcgrad", max_length=16, **COMMON)
    return MTLSFTTrainer(model=adapted, args=arguments, train_dataset=parts, processing_class=tokenizer())


def _by_length(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


_ONLINE = {"num_generations": 4, "max_completion_length": 4, "extra": {"reward_funcs": _by_length}}


def _labelled() -> Dataset:
    return rows(prompt=2, completion=3).add_column("label", [True, False] * (2 * STEPS))


def _messages() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": _text(generator, 3)}]} for _ in range(4 * STEPS)]
    )


# By name: the model's task, and what makes the trainer from a folder and an adapted model.
TRAINERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "`Trainer`": ("CAUSAL_LM", partial(_transformers, Trainer, TrainingArguments)),
    "`Seq2SeqTrainer`": ("CAUSAL_LM", partial(_transformers, Seq2SeqTrainer, Seq2SeqTrainingArguments)),
    "`MTLTrainer`": ("CAUSAL_LM", _mtl),
    "`MTLSFTTrainer`": ("CAUSAL_LM", _mtl_sft),
    "TRL `SFTTrainer`": ("CAUSAL_LM", lambda *a: _trl("SFT", rows(prompt=3, completion=3), *a, max_length=16)),
    "TRL `DPOTrainer`": ("CAUSAL_LM", lambda *a: _trl("DPO", rows(prompt=2, chosen=3, rejected=3), *a)),
    "TRL `KTOTrainer`": ("CAUSAL_LM", lambda *a: _trl("KTO", _labelled(), *a)),
    "TRL `RewardTrainer`": ("SEQ_CLS", lambda *a: _trl("Reward", rows(chosen=4, rejected=4), *a)),
    "TRL `GRPOTrainer`": ("CAUSAL_LM", lambda *a: _trl("GRPO", rows(prompt=3), *a, **_ONLINE)),
    "TRL `RLOOTrainer`": ("CAUSAL_LM", lambda *a: _trl("RLOO", rows(prompt=3), *a, **_ONLINE)),
    "TRL `DistillationTrainer`": (
        "CAUSAL_LM",
        lambda *a: _trl(
            "Distillation", _messages(), *a, max_completion_length=4, extra={"teacher_model": model(seed=1)}
        ),
    ),
}
