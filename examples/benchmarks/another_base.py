"""
Train beside a 4-bit base, serve on the original one: what that changes, measured.

A small byte-level Llama is trained on this repository's prose. Adapters are then trained on its Python code beside the
NF4 base, and evaluated on held-out code there, on the original weights, and merged into these. No downloads.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common.arguments import out_file, positive
from _common.runner import finish, parser_for
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from peft_ext import NeuroAdaConfig


ROOT = Path(__file__).parents[2]
LENGTH, BATCH = 128, 16
METHODS: dict[str, Any] = {
    "NeuroAda k=1": (8e-3, lambda: NeuroAdaConfig(k=1)),
    "NeuroAda k=8": (3e-3, lambda: NeuroAdaConfig(k=8)),
    "LoRA r=8": (2e-3, lambda: LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")),
}


def rows(pattern: str) -> Tensor:
    """Files of this repository as rows of bytes, int64 `[rows, LENGTH]`."""
    files = [path for path in sorted(ROOT.glob(pattern)) if not path.relative_to(ROOT).parts[0].startswith(".")]
    content = b"".join(path.read_bytes() for path in files)
    whole = torch.frombuffer(bytearray(content), dtype=torch.uint8).long()
    return whole[: len(whole) // LENGTH * LENGTH].view(-1, LENGTH)


def batches(data: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield data[torch.randint(len(data), (BATCH,), generator=generator)]


def train(model: Any, data: Tensor, steps: int, rate: float, seed: int) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.06)
    model.train()
    for batch in batches(data, steps, seed):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def loss(model: Any, data: Tensor) -> float:
    """Nats per byte."""
    parts = data.split(BATCH)
    return statistics.mean(float(model(input_ids=part, labels=part).loss) for part in parts)


def pretrained(folder: Path, steps: int) -> None:
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    train(model, rows("**/*.md"), steps, 3e-3, 0)
    model.save_pretrained(folder)


def measure(folder: Path, method: str, steps: int, seed: int) -> dict[str, float]:
    rate, config = METHODS[method]
    code = rows("peft_ext/sparse/**/*.py")
    training, test = code[: -8 * BATCH], code[-8 * BATCH :]
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    base = LlamaForCausalLM.from_pretrained(folder, quantization_config=nf4, device_map={"": "cpu"}).eval()
    result = {"4-bit base": loss(base, test)}
    torch.manual_seed(seed)
    model = get_peft_model(base, config())
    train(model, training, steps, rate, seed)
    result["4-bit base + adapter (trained so)"] = loss(model, test)
    with tempfile.TemporaryDirectory() as adapter:
        model.save_pretrained(adapter)
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            original = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
            result[f"{name} base"] = loss(original, test)
            loaded = PeftModel.from_pretrained(original, adapter).eval()
            result[f"{name} base + adapter"] = loss(loaded, test)
            result[f"{name}, merged"] = loss(loaded.merge_and_unload(), test)
    return result


def shown(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--steps", type=positive, default=300, help="per training (%(default)s)")
    parser.add_argument("--seeds", type=positive, default=3, help="trainings per method (%(default)s)")
    parser.add_argument("--out", type=out_file, help="write the losses to this JSON file")
    options = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {method: {} for method in METHODS}
    with tempfile.TemporaryDirectory() as name:
        pretrained(Path(name), 2 * options.steps)
        for method in METHODS:
            for seed in range(options.seeds):
                for place, value in measure(Path(name), method, options.steps, seed).items():
                    found[method].setdefault(place, []).append(value)
    places = list(next(iter(found.values())))
    print(f"| nats per byte of held-out code | {' | '.join(METHODS)} |\n|---|{'---:|' * len(METHODS)}")
    for place in places:
        cells = [shown(found[method][place]) for method in METHODS]
        print(f"| {place} | {' | '.join(cells)} |")
    finish(options, {"options": {"steps": options.steps, "seeds": options.seeds}, "losses": found})


if __name__ == "__main__":
    main()
