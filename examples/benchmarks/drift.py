"""
What merging and unmerging after every step of reinforcement learning does to a base in bfloat16.

For generation with vLLM, TRL's GRPO trainer merges the adapter into the base, copies the weights and unmerges, once
per step. LoRA subtracts what it added, each time with bfloat16's rounding. A sparse adapter puts back what was there.

A small Llama of letters is trained on this repository's prose, and then by GRPO to write vowels. After every step its
weights are read by TRL's own code. Two tables: how far the base moves in cycles of merging and unmerging, and what the
saved adapter computes on the original base, beside the model that was trained. No downloads, no vLLM.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, ShiraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from peft_ext import NeuroAdaConfig


ROOT = Path(__file__).parents[2]
LETTERS = "abcdefghijklmnopqrstuvwxyz_"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
LENGTH, BATCH, PROMPT, COMPLETION = 48, 16, 4, 16
ALL = "all-linear"
METHODS: dict[str, Any] = {
    "NeuroAda k=4": (5e-3, lambda: NeuroAdaConfig(k=4)),
    "SHiRA r=8": (2e-3, lambda: ShiraConfig(r=8, target_modules=ALL)),
    "LoRA r=8": (1e-3, lambda: LoraConfig(r=8, lora_alpha=16, target_modules=ALL)),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *LETTERS])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


def prose() -> Tensor:
    """The documentation's letters, int64 `[rows, LENGTH]`."""
    text = "_".join(path.read_text(encoding="utf-8").lower() for path in sorted(ROOT.glob("docs/**/*.md")))
    words = re.sub("[^a-z]+", "_", text)
    ids = torch.tensor([LETTERS.index(letter) + len(SPECIAL) for letter in words])
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def pretrained(folder: Path, width: int, steps: int) -> None:
    """Write a base in bfloat16 that spells a little."""
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(LETTERS), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model, data = LlamaForCausalLM(config), prose()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = data[torch.randint(len(data), (BATCH,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def base_model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def vowels(completions: list[str], **_: Any) -> list[float]:
    """The reward: the share of vowels."""
    return [sum(letter in "aeiou" for letter in text) / COMPLETION for text in completions]


def weights_for_vllm(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Merge, yield name and weight one after the other, and unmerge: TRL's own code for its copy to vLLM."""
    whole = SimpleNamespace(gather_params=lambda parameters: nullcontext(), is_fsdp=False)
    stand_in = SimpleNamespace(model=model, _dist=whole, _fix_param_name_to_vllm=lambda name, extra_prefixes: name)
    yield from VLLMGeneration._iter_named_params(stand_in)


class ReadEveryStep(TrainerCallback):
    """Read the weights after every step, as generation with vLLM does before the next one."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        deque(weights_for_vllm(model), maxlen=0)


def weights(model: PeftModel) -> dict[str, Tensor]:
    """The base's weights that an adapter changes, in float32."""
    state = model.get_base_model().state_dict()
    return {name: tensor.float() for name, tensor in state.items() if name.endswith("base_layer.weight")}


def drift(model: PeftModel, first: dict[str, Tensor], original: LlamaForCausalLM, texts: Tensor) -> dict[str, float]:
    """How far the base is from the original: weights over their mean magnitude, logits over their deviation."""
    now = weights(model)
    changes = [(now[name] - first[name]).abs() for name in first]
    magnitude = sum(float(weight.abs().sum()) for weight in first.values())
    with torch.no_grad(), model.disable_adapter():
        logits, expected = model(input_ids=texts).logits.float(), original(input_ids=texts).logits.float()
    return {
        "weights": sum(float(change.sum()) for change in changes) / magnitude,
        "largest": max(float(change.max()) for change in changes) * sum(c.numel() for c in changes) / magnitude,
        "changed": sum(int((change > 0).sum()) for change in changes) / sum(change.numel() for change in changes),
        "logits": float((logits - expected).abs().max() / expected.std()),
    }


@torch.no_grad()
def completions(model: Any, folder: Path, samples: int) -> list[str]:
    """Sampled completions; the same model gives the same."""
    letters = PreTrainedTokenizerFast.from_pretrained(folder)
    torch.manual_seed(1)
    prompts = prose()[:samples, :PROMPT]
    written = model.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=COMPLETION, do_sample=True,
        top_k=0, suppress_tokens=[2],
    )  # fmt: skip
    return letters.batch_decode(written[:, PROMPT:], skip_special_tokens=True)


def reinforced(folder: Path, out: Path, config: Any, rate: float, steps: int) -> PeftModel:
    """GRPO with the weights read after every step."""
    letters = PreTrainedTokenizerFast.from_pretrained(folder)
    prompts = letters.batch_decode(prose()[:256, :PROMPT])
    trainer = GRPOTrainer(
        model=base_model(folder),
        args=GRPOConfig(
            str(out), max_steps=steps, learning_rate=rate, per_device_train_batch_size=16, num_generations=8,
            max_completion_length=COMPLETION, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, seed=0, gradient_checkpointing=False,
            lr_scheduler_type="constant",
        ),
        reward_funcs=vowels,
        train_dataset=Dataset.from_dict({"prompt": [prompt.replace(" ", "") for prompt in prompts]}),
        processing_class=letters,
        peft_config=config,
        callbacks=[ReadEveryStep()],
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(out))
    model: PeftModel = trainer.model
    return model.eval()


def measure(folder: Path, method: str, options: argparse.Namespace) -> dict[str, Any]:
    rate, config = METHODS[method]
    texts, original = prose()[:64], base_model(folder)
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        model = reinforced(folder, out, config(), rate, options.steps)
        served = PeftModel.from_pretrained(base_model(folder), out).eval()
    first = weights(served)
    with torch.no_grad():
        trained, loaded = (m(input_ids=texts).logits.float() for m in (model, served))
    mine, theirs = (completions(m, folder, options.samples) for m in (model, served))
    result = {
        "trained": statistics.mean(vowels(mine)),
        "served": statistics.mean(vowels(theirs)),
        "same": statistics.mean(a == b for a, b in zip(mine, theirs, strict=True)),
        "difference": float((trained - loaded).abs().max() / loaded.std()),
        "drift": drift(model, first, original, texts),
    }
    cycles = []
    for cycle in range(1, max(options.cycles) + 1):
        deque(weights_for_vllm(served), maxlen=0)
        if cycle in options.cycles:
            cycles.append({"cycles": cycle, **drift(served, first, original, texts)})
    return {**result, "cycles": cycles}


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def drifted(found: dict[str, float]) -> list[str]:
    return [f"{100 * found['changed']:.1f}", f"{found['largest']:.2g}", f"{found['logits']:.2g}"]


def tables(found: dict[str, Any]) -> str:
    base = ["base weights changed, %", "largest change / mean weight", "base logits change / sd"]
    cycles = [[name, str(one["cycles"]), *drifted(one)] for name, result in found.items() for one in result["cycles"]]
    trained = [
        [name, *drifted(one["drift"]), f"{one['difference']:.2g}", f"{100 * one['same']:.1f}"]
        + [f"{one[when]:.3f}" for when in ("trained", "served")]
        for name, one in found.items()
    ]
    served = ["trained and saved logits differ / sd", "same completions, %", "reward in training", "reward as saved"]
    return "\n\n".join([table(["method", "cycles", *base], cycles), table(["after GRPO", *base, *served], trained)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of GRPO (default: %(default)s)")
    parser.add_argument("--pretraining", type=int, default=300, help="steps (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="of the model (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=512, help="completions per reward (default: %(default)s)")
    parser.add_argument("--cycles", type=int, nargs="+", default=[1, 10, 100, 1000], help="(default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        pretrained(Path(name), options.width, options.pretraining)
        found = {method: measure(Path(name), method, options) for method in options.methods}
    print(tables(found))
    if options.out:
        settings = {name: value for name, value in vars(options).items() if name != "out"}
        options.out.write_text(json.dumps({"options": settings, "results": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
