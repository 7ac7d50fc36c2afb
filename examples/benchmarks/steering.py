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
import re
import time
from collections.abc import Sequence
from typing import Any

from _common.arguments import at_least, positive, refusing
from _common.llava import LlavaShape, check_steering, llava, llava_batch
from _common.methods import require_input_gradients, share
from _common.models import LINEARS
from _common.report import table
from _common.runner import add_run, begin, finish, parser_for, time_row, times_of
from _common.steps import Stepper, interleave
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from torch import nn

from peft_ext import MoReSConfig


SYNTAX = re.compile(r"mores-r(?P<mores>[1-9]\d*)(@(?P<percent>[1-9]\d*))?|lora-r(?P<lora>[1-9]\d*)|ia3")
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
    return get_peft_model(share(base), peft_config(name)).train()


def peft_config(name: str) -> PeftConfig:
    """The configuration of an adapter, by the method's name."""
    match = SYNTAX.fullmatch(name)
    if match is None:
        raise ValueError(
            f"`methods` contains {name!r}: use frozen, mores-r<r>, mores-r<r>@<percent>, lora-r<r>, ia3 or full"
        )
    if match["mores"]:
        return MoReSConfig(rank=int(match["mores"]), token_ratio=int(match["percent"] or 1) / 100)
    if match["lora"]:
        return LoraConfig(r=int(match["lora"]), lora_alpha=2 * int(match["lora"]), target_modules=text_linears())
    names = r".*language_model\.layers\.\d+\..*\."
    return IA3Config(target_modules=names + "(k_proj|v_proj|down_proj)", feedforward_modules=names + "down_proj")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_for(__doc__)
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--hidden", type=positive, default=512, help="width of the residual stream (%(default)s)")
    sizes.add_argument("--intermediate", type=positive, default=1408, help="width of the MLP (%(default)s)")
    sizes.add_argument("--layers", type=at_least(2), default=12, help="decoder blocks (%(default)s)")
    sizes.add_argument("--heads", type=positive, default=8, help="attention heads (%(default)s)")
    sizes.add_argument("--vocab", type=at_least(3), default=1024, help="vocabulary (%(default)s)")
    sizes.add_argument("--batch", type=positive, default=1, help="sequences of a batch (%(default)s)")
    sizes.add_argument("--side", type=positive, default=20, help="an image has this many tokens squared (%(default)s)")
    sizes.add_argument("--text-tokens", type=at_least(2), default=64, help="text tokens of a sequence (%(default)s)")
    add_run(parser, threads=1, steps=20)
    parser.add_argument(
        "--cpu-time", action="store_true", help="the process's CPU time instead of wall time: for a machine in use"
    )
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help=f"({' '.join(METHODS)})")
    args = parser.parse_args(argv)
    with refusing(parser):
        shape_of(args)
        for name in args.methods:
            if name not in ("frozen", "full"):
                peft_config(name)
    return args


def shape_of(args: argparse.Namespace) -> LlavaShape:
    return LlavaShape(
        args.hidden, args.intermediate, args.layers, args.heads, args.vocab, args.batch, args.side, args.text_tokens
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    dtype, device = begin(args)
    checked = check_steering(dtype, device)
    print(
        "MoReS against its formula:", ", ".join(f"{name} {value:.1e}" for name, value in checked.items()), flush=True
    )
    shape = shape_of(args)
    base, batch = llava(shape, dtype, device), llava_batch(shape, dtype, device)
    steppers = {name: Stepper(adapt(base, name), batch) for name in dict.fromkeys(args.methods)}
    clock = time.process_time if args.cpu_time else time.perf_counter
    times = interleave(steppers, args.steps, args.warmup, device, clock=clock)
    results = {}
    for name, stepper in steppers.items():
        trained = sum(p.numel() for p in stepper.model.parameters() if p.requires_grad)
        results[name] = times_of(name, times, ("frozen", "lora-r8"), trained)
    print(table([time_row(*item) for item in results.items()]))
    return finish(args, {"shape": vars(shape), "gate": checked, "results": results})


if __name__ == "__main__":
    main()
