"""
Time of one training step of a LLaVA-shaped model: MoReS beside the frozen limit, LoRA, IA3 and full training.

    python examples/benchmarks/steering.py
    python examples/benchmarks/steering.py --device cuda --dtype bfloat16 --hidden 4096 --intermediate 11008

A step is zero_grad, forward, backward and AdamW. `frozen` trains nothing: it is the forward pass and the gradients
down to the input embeddings, which any method before the first layer needs. MoReS is compared with its formula first;
if they differ, nothing is timed. Steps of all methods are interleaved in one process, and ratios are medians over
rounds.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common.llava import LlavaShape, check_steering, llava, llava_batch
from _common.methods import require_input_gradients, share
from _common.models import LINEARS
from _common.report import environment, table
from _common.steps import Spread, Stepper, interleave, pair_ratio
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from peft_ext import MoReSConfig


METHODS = ("frozen", "mores-r1", "mores-r8", "mores-r1@100", "lora-r8", "ia3", "full")


def text_linears() -> str:
    """The seven linear layers of the text model's blocks, not the vision tower's."""
    return rf".*language_model\.layers\.\d+\..*\.({'|'.join(LINEARS)})"


def adapt(base: nn.Module, name: str) -> nn.Module:
    """The base prepared for one method, with the base's own weights."""
    if name == "frozen":
        model = share(base)
        require_input_gradients(model)
        return model
    if name == "full":
        # Weights of its own: these move. The vision tower stays frozen, as in LLaVA's recipe.
        model: Any = copy.deepcopy(base)
        for part in (model.get_decoder(), model.get_output_embeddings()):
            part.requires_grad_(True)
        return model
    kind, _, rest = name.partition("-r")
    if kind == "mores":
        rank, _, percent = rest.partition("@")
        config: Any = MoReSConfig(rank=int(rank), token_ratio=int(percent or 1) / 100)
    elif kind == "lora":
        config = LoraConfig(r=int(rest), lora_alpha=2 * int(rest), target_modules=text_linears())
    elif kind == "ia3":
        names = r".*language_model\.layers\.\d+\..*\."
        config = IA3Config(target_modules=names + "(k_proj|v_proj|down_proj)", feedforward_modules=names + "down_proj")
    else:
        raise ValueError(
            f"`methods` contains {name!r}: use frozen, mores-r<r>, mores-r<r>@<percent>, lora-r<r>, ia3 or full"
        )
    return get_peft_model(share(base), config).train()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--hidden", type=int, default=512, help="width of the residual stream (%(default)s)")
    sizes.add_argument("--intermediate", type=int, default=1408, help="width of the MLP (%(default)s)")
    sizes.add_argument("--layers", type=int, default=12, help="decoder blocks (%(default)s)")
    sizes.add_argument("--heads", type=int, default=8, help="attention heads (%(default)s)")
    sizes.add_argument("--vocab", type=int, default=1024, help="vocabulary (%(default)s)")
    sizes.add_argument("--batch", type=int, default=1, help="sequences of a batch (%(default)s)")
    sizes.add_argument("--side", type=int, default=20, help="an image has this many tokens squared (%(default)s)")
    sizes.add_argument("--text-tokens", type=int, default=64, help="text tokens of a sequence (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base (float32)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:<n> (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="the process's CPU time instead of wall time: for a machine in use"
    )
    parser.add_argument("--steps", type=int, default=20, help="timed rounds, one step of each method (%(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before (%(default)s)")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help=f"({' '.join(METHODS)})")
    parser.add_argument("--out", type=Path, help="write everything, with the raw times, to this JSON file")
    args = parser.parse_args(argv)
    for name in ("steps", "warmup", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be a positive integer, got {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    torch.set_num_threads(args.threads)
    checked = check_steering(dtype, device)
    print(
        "MoReS against its formula:", ", ".join(f"{name} {value:.1e}" for name, value in checked.items()), flush=True
    )
    shape = LlavaShape(
        args.hidden, args.intermediate, args.layers, args.heads, args.vocab, args.batch, args.side, args.text_tokens
    )
    base, batch = llava(shape, dtype, device), llava_batch(shape, dtype, device)
    steppers = {name: Stepper(adapt(base, name), batch) for name in dict.fromkeys(args.methods)}
    gc.collect()
    gc.disable()  # a collection would fall on some method's step
    clock = time.process_time if args.cpu_time else time.perf_counter
    times = interleave(steppers, args.steps, args.warmup, device, clock=clock)
    gc.enable()
    references = [name for name in ("frozen", "lora-r8") if name in times]
    rows, results = [], {}
    for name, sample in times.items():
        trained = sum(p.numel() for p in steppers[name].model.parameters() if p.requires_grad)
        ratios = {other: pair_ratio(sample, times[other]) for other in references}
        rows.append(
            {"step": name, "trained": f"{trained:,}", "ms": f"{1000 * Spread.of(sample).median:.1f}"}
            | {f"/ {o} (quartiles)": f"{r.median:.3f} ({r.lower:.3f}-{r.upper:.3f})" for o, r in ratios.items()}
        )
        results[name] = {
            "trained_parameters": trained,
            "times": sample,
            "ratios": {other: vars(ratio) for other, ratio in ratios.items()},
        }
    print(table(rows))
    report = {"environment": environment(device), "shape": vars(shape), "gate": checked, "results": results}
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
