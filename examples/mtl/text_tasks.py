"""
Two text tasks with NeuroAda in `MTLSFTTrainer`: copying a row of words and turning it round, on a small Llama made
here, or on a model from a folder or the Hub.

    python examples/mtl/text_tasks.py --method pcgrad --out out/text
    python examples/mtl/text_tasks.py --model HuggingFaceTB/SmolLM2-135M --method cagrad

Prints the loss of each task before and after, and how often their gradients conflicted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from peft_ext import NeuroAdaConfig
from peft_ext.mtl import METHODS, MTLSFTConfig, MTLSFTTrainer


WORDS = [
    "red",
    "green",
    "blue",
    "black",
    "white",
    "one",
    "two",
    "three",
    "four",
    "five",
    "sun",
    "moon",
    "star",
    "rain",
]
TASKS = ("copy", "reverse")


def make_task(name: str, count: int, seed: int) -> Any:
    """Prompts and completions: the words again, or in reverse order."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        words = [WORDS[i] for i in torch.randint(len(WORDS), (4,), generator=generator).tolist()]
        answer = words if name == "copy" else words[::-1]
        rows.append({"prompt": f"{name} : {' '.join(words)} = ", "completion": " ".join(answer)})
    return Dataset.from_list(rows)


def small_llama() -> tuple[Any, Any]:
    """A random Llama of 0.4 million weights and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", ":", "=", *TASKS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.08,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a causal language model; by default one made here")
    parser.add_argument("--method", choices=METHODS, default="pcgrad")
    parser.add_argument("--k", type=int, default=32, help="trained entries per neuron")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--out", type=Path, default=Path("mtl_text_output"))
    args = parser.parse_args(argv)
    if args.model:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    else:
        model, tokenizer = small_llama()
    trainer = MTLSFTTrainer(
        model=model,
        args=MTLSFTConfig(
            output_dir=str(args.out),
            mtl_method=args.method,
            max_steps=args.steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=16,
            learning_rate=args.learning_rate,
            max_length=32,
            logging_steps=max(1, args.steps // 6),
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
        ),
        train_dataset={task: make_task(task, 256, seed) for seed, task in enumerate(TASKS)},
        eval_dataset={task: make_task(task, 32, 100 + seed) for seed, task in enumerate(TASKS)},
        processing_class=tokenizer,
        peft_config=NeuroAdaConfig(task_type="CAUSAL_LM", k=args.k),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for task in TASKS:
        print(f"{task:8} loss {before[f'eval_{task}_loss']:.3f} -> {after[f'eval_{task}_loss']:.3f}")
    summary = trainer.conflicts.summary(args.steps)
    print(f"conflicts {summary['gradient_conflict_incidence_all']:.1f} % of the steps")
    trainer.save_model(str(args.out / "adapter"))


if __name__ == "__main__":
    main()
