"""
Time and memory of one training step: NeuroAda beside LoRA, SHiRA, Super-Tuning, masked and full training.

    python examples/benchmarks/step.py                          # the default: CPU, fp32, 2 threads
    python examples/benchmarks/step.py --preset llama-3-8b --device cuda --dtype bfloat16 --batch 2 --tokens 512
    python examples/benchmarks/step.py --preset llama-7b --device cuda --dtype bfloat16 --batch 8 --tokens 1024 \
        --checkpointing --layers 16                             # a part of the depth, where the memory ends

A step is zero_grad, forward, backward and AdamW on a Llama-shaped model with random weights, all seven linears of a
block adapted. NeuroAda's outputs and gradients are compared with the dense reference first; if they differ, nothing is
timed. Steps of all methods are interleaved in one process and ratios are medians over rounds, so that a slow spell of
the machine does not decide. `_common/methods.py` says what each method is.

Masked and full training keep dense weights of their own. On a GPU they therefore run alone, after the others
(`--solo`), and a method that does not fit is left out of the tables and noted.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from _common.arguments import at_least, refusing
from _common.gate import Check, gate, gate_table, require
from _common.methods import Method, adapt, trained_parameters
from _common.models import LINEARS, PRESETS, llama, token_batch
from _common.report import mebibytes, table
from _common.runner import add_llama_sizes, add_run, begin, finish, llama_shape, parser_for, time_row, times_of
from _common.step_memory import layer_memory, model_memory
from _common.steps import Stepper, fits, interleave, print_profile
from torch import Tensor, nn
from tqdm import tqdm


METHODS = (
    "frozen",
    "frozen-inputs",
    "neuroada-k1",
    "neuroada-k20",
    "lora-r8",
    "shira-k20",
    "supertuning-k20",
    "masked-k20",
    "full",
)
# The first method of each of these kinds is what the others' times are divided by.
REFERENCES = ("lora", "frozen", "shira", "supertuning")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_for(__doc__)
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--preset", choices=PRESETS, help="the sizes of a published model; what you pass yourself wins")
    add_llama_sizes(sizes)
    sizes.add_argument("--layer", type=at_least(4), default=2048, help="width of the one square layer (%(default)s)")
    add_run(parser, steps=30, warmup=3)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help=f"({' '.join(METHODS)})")
    parser.add_argument("--solo", nargs="*", metavar="METHOD", help="timed alone, last (on CUDA: masked and full)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute each block's activations in backward")
    parser.add_argument("--profile", action="store_true", help="also print where the time of each method's step goes")
    preset = parser.parse_known_args(argv)[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    args = parser.parse_args(argv)
    with refusing(parser):
        llama_shape(args)
        for name in (*args.methods, *(args.solo or ())):
            Method.parse(name)
    if args.solo is None:
        dense = ("masked", "full")
        args.solo = [name for name in args.methods if name.startswith(dense) and args.device.startswith("cuda")]
    return args


def memory_table(results: dict[str, dict[str, Any]], layer: int) -> str:
    return table(
        [
            {
                "MiB": name,
                "saved": mebibytes(result["saved_bytes"]),
                f"saved {layer}²": mebibytes(result["layer_saved_bytes"]),
                f"weight-sized allocations {layer}²": str(result["layer_weight_sized_allocations"]),
                "peak of a step": mebibytes(result["peak_bytes"]),
                "optimiser": mebibytes(result["optimizer_bytes"]),
                "all in all": mebibytes(result["resident_bytes"] + result["optimizer_bytes"] + result["peak_bytes"]),
                "file": mebibytes(result["file_bytes"]),
            }
            for name, result in results.items()
        ]
    )


def measure(
    base: nn.Module, methods: Sequence[Method], batch: dict[str, Tensor], args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Times and bytes of some methods, timed together; those that run out of memory are missing."""
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    models: dict[str, nn.Module] = {}
    steppers: dict[str, Stepper] = {}
    for method in tqdm(methods, desc="building", unit="model"):
        try:
            model = adapt(base, method, LINEARS)
            stepper = Stepper(model, batch)
            if device.type == "cuda" and not fits(stepper):
                raise torch.OutOfMemoryError
        except torch.OutOfMemoryError:
            model = stepper = None  # type: ignore[assignment]  # frees them
            gc.collect()
            torch.cuda.empty_cache()
            continue
        models[method.name], steppers[method.name] = model, stepper
    times = interleave(steppers, args.steps, args.warmup, device)
    results: dict[str, dict[str, Any]] = {}
    for method in tqdm([m for m in methods if m.name in models], desc="memory", unit="model"):
        name = method.name
        results[name] = {
            **times_of(name, times, (), trained_parameters(models[name], method)),
            **model_memory(models[name], steppers[name], device),
            **layer_memory(method, args.layer, dtype, device),
        }
    if args.profile:
        for name, stepper in steppers.items():
            print_profile(name, stepper, device)
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    methods = [Method.parse(name) for name in dict.fromkeys(args.methods)]
    shape, (dtype, device) = llama_shape(args), begin(args)
    checks: list[Check] = []
    if any(method.kind == "neuroada" for method in methods):
        checks = gate(shape, dtype, device)
        print(gate_table(checks), flush=True)
        require(checks)

    base, batch = llama(shape, dtype, device), token_batch(shape, device)
    if args.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    groups = [[m for m in methods if m.name not in args.solo], *([m] for m in methods if m.name in args.solo)]
    measured: dict[str, dict[str, Any]] = {}
    for group in groups:
        measured |= measure(base, group, batch, args) if group else {}
    results = {method.name: measured[method.name] for method in methods if method.name in measured}
    times = {name: result["times"] for name, result in results.items()}
    references = [next((name for name in results if Method.parse(name).kind == kind), "") for kind in REFERENCES]
    for name, result in results.items():
        result |= times_of(name, times, references, result["trained_parameters"])
    print(f"\n{table([time_row(*item) for item in results.items()])}\n\n{memory_table(results, args.layer)}")
    print("Peaks are above what is allocated when a step begins; on CPU from the profiler's allocator records.")
    missing = [method.name for method in methods if method.name not in results]
    if missing:
        print(f"Out of memory: {', '.join(missing)}.")

    content = {"shape": asdict(shape), "checkpointing": args.checkpointing, "out_of_memory": missing}
    return finish(args, {**content, "gate": [asdict(entry) for entry in checks], "results": results})


if __name__ == "__main__":
    main()
