"""TRL's trainer with sparse adapters on two text tasks."""

import os

import datasets
import torch

from peft_ext import NeuroAdaConfig
from peft_ext.mtl import MTLSFTConfig, MTLSFTTrainer
from peft_ext.mtl.data.datasets import concatenate_tasks
from tests._models.vision_language import build
from tests._words import make_tokenizer
from tests.mtl._models import QUIET


WORDS = ["the", "a", "cat", "dog", "bird", "sees", "hears", "likes", "small", "big", "house", "tree", "and"]


def texts(seed, count=24):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    picks = [torch.randint(len(WORDS), (n,), generator=generator).tolist() for n in lengths]
    return datasets.Dataset.from_list([{"text": " ".join(WORDS[i] for i in row)} for row in picks])


def in_one(**data):
    """Data sets of several tasks as one with their numbers."""
    return concatenate_tasks(data, "task_ids")


def run(folder, model=None, train=True, train_dataset=None, eval_dataset=None, **options):
    defaults = {
        **QUIET,
        "per_device_train_batch_size": 12,
        "max_steps": 2,
        "learning_rate": 3e-2,
        "max_length": 16,
        "logging_steps": 1,
        "shuffle_dataset": False,
    }
    result = MTLSFTTrainer(
        model=model if model is not None else build("llama"),
        args=MTLSFTConfig(output_dir=str(folder), **{**defaults, **options}),
        train_dataset=train_dataset or {"short": texts(1), "long": texts(2)},
        eval_dataset=eval_dataset or {"short": texts(3, 6), "long": texts(4, 6)},
        processing_class=make_tokenizer(WORDS),
        peft_config=NeuroAdaConfig(task_type="CAUSAL_LM", k=2),
    )
    if train:
        result.train()
    return result


def train(folder, options):
    """Weights, tokens, and evaluation of a training whose micro-batches lack tasks, in one process or several."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    data = in_one(short=texts(3, 5), long=texts(4, 6))
    result = run(
        folder,
        eval_dataset=data,
        task_names=["short", "long"],
        task_sampling="proportional",
        per_device_train_batch_size=6 // processes // 3,
        per_device_eval_batch_size=4 // processes,
        gradient_accumulation_steps=3,
        max_steps=4,
        **({"ddp_backend": "gloo"} if processes > 1 else {}),
        **options,
    )
    metrics = result.evaluate()
    return {
        "weights": {name: p.detach().clone() for name, p in result.model.named_parameters() if p.requires_grad},
        "tokens": [entry["num_tokens"] for entry in result.state.log_history if "num_tokens" in entry],
        "accuracy": [e["mean_token_accuracy"] for e in result.state.log_history if "mean_token_accuracy" in e],
        "evaluation": {task: metrics[f"eval_{task}_loss"] for task in result.task_names},
    }
