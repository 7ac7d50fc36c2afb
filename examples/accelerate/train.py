"""Train a NeuroAda adapter of a language model in several processes, save it, and load it again in one.

    accelerate launch --config_file examples/accelerate/ddp.yaml examples/accelerate/train.py

By default a small byte-level Llama with random weights learns this repository's README: nothing is downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_ext import NeuroAdaConfig


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a causal language model (default: a small random one)")
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[2] / "README.md", help="file to learn")
    parser.add_argument("--out", type=Path, default=Path("accelerate_adapter"), help="folder for the adapter")
    parser.add_argument("--k", type=int, default=8, help="trained entries per neuron")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8, help="samples per step, of all processes together")
    parser.add_argument("--length", type=int, default=128, help="tokens per sample")
    return parser.parse_args()


def base_model(name: str | None) -> PreTrainedModel:
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name)
    set_seed(0)  # the same weights in every process, and when the adapter is loaded
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=512, **sizes))


def samples(options: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    text = options.text.read_text(encoding="utf-8")
    numbers = AutoTokenizer.from_pretrained(options.model)(text)["input_ids"] if options.model else list(text.encode())
    pieces = torch.tensor(numbers).split(options.length)[:-1]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main() -> None:
    options = parse()
    data = samples(options)
    evaluation = data[: options.batch_size]
    arguments = TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        learning_rate=2e-2,
        logging_steps=10,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    arguments.per_device_train_batch_size = max(1, options.batch_size // arguments.world_size)
    model = get_peft_model(base_model(options.model), NeuroAdaConfig(k=options.k, task_type="CAUSAL_LM"))
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=evaluation)
    # Not evaluated before: accelerate 1.15 takes a model that was evaluated for a prepared one, leaves out
    # DistributedDataParallel when training starts, and every process trains on its own.
    trainer.train()
    together = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    if arguments.process_index != 0:
        return
    device = arguments.device
    loaded = PeftModel.from_pretrained(base_model(options.model), options.out).to(device).eval()
    batch = torch.stack([sample["input_ids"] for sample in evaluation]).to(device)
    with torch.no_grad():
        alone = float(loaded(input_ids=batch, labels=batch).loss)
    print(f"{arguments.world_size} processes, {trainer.accelerator.distributed_type}")
    print(f"loss after training {together:.6f}, of the saved adapter in one process {alone:.6f}")


if __name__ == "__main__":
    main()
