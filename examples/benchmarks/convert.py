"""
Time and memory of one training step: PEFT's SHiRA and Super-Tuning beside the same adapters after `peft_ext.convert`.

    python examples/benchmarks/convert.py                # the default: CPU, fp32, 2 threads
    python examples/benchmarks/convert.py --device cuda --dtype bfloat16 --hidden 4096 --intermediate 11008

A step is zero_grad, forward, backward and AdamW on a Llama-shaped model with random weights, all seven linears of a
block adapted. A converted adapter's loss and gradients are compared with those of the one it came from first; if they
differ, nothing is timed. Steps are interleaved in one process and ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from _common.arguments import at_least, device_name, out_file, positive, refusing
from _common.memory import adapter_file_bytes, peak_bytes, saved_bytes
from _common.methods import Method, adapt, share, trained_parameters
from _common.models import LINEARS, Shape, llama, token_batch
from _common.report import environment, mebibytes, table, write_report
from _common.steps import Spread, Stepper, interleave, pair_ratio
from torch import Tensor, nn
from tqdm import tqdm

from peft_ext import convert
from peft_ext.sparse.layers import SparseLayer


PEERS = ("shira-k20", "supertuning-k20", "supertuning-k1")
REFERENCES = ("frozen", "lora-r8")
# Largest error over the largest entry of the reference. fp32 sums in another order differ by some 1e-6.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


class GateError(RuntimeError):
    """A converted adapter computes something else: its step time means nothing."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=positive, default=1024, help="width of the residual stream (%(default)s)")
    parser.add_argument("--intermediate", type=positive, default=2816, help="width of the MLP (%(default)s)")
    parser.add_argument("--layers", type=positive, default=4, help="decoder blocks (%(default)s)")
    parser.add_argument("--heads", type=positive, help="attention heads (hidden / 64)")
    parser.add_argument("--vocab", type=positive, default=1024, help="vocabulary (%(default)s)")
    parser.add_argument("--batch", type=positive, default=4, help="sequences of a batch (%(default)s)")
    parser.add_argument("--tokens", type=at_least(3), default=256, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="float32", help="of the base (%(default)s)")
    parser.add_argument("--device", type=device_name, default="cpu", help="cpu, cuda or cuda:<n> (%(default)s)")
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--steps", type=positive, default=10, help="timed rounds, a step of each model (%(default)s)")
    parser.add_argument("--warmup", type=positive, default=2, help="rounds before (%(default)s)")
    parser.add_argument("--peers", nargs="+", default=PEERS, metavar="METHOD", help=f"({' '.join(PEERS)})")
    parser.add_argument("--out", type=out_file, help="write everything, with the raw times, to this JSON file")
    args = parser.parse_args(argv)
    args.heads = args.heads or max(1, args.hidden // 64)
    with refusing(parser):
        shape_of(args)
        for name in args.peers:
            if Method.parse(name).kind not in ("shira", "supertuning"):
                raise ValueError(f"`peers` contains {name!r}: use shira-k<k> or supertuning-k<k>")
    return args


def shape_of(args: argparse.Namespace) -> Shape:
    return Shape(args.hidden, args.intermediate, args.layers, args.heads, args.vocab, args.batch, args.tokens)


def with_values(model: nn.Module) -> nn.Module:
    """An adapter as training leaves it, not at zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return model


def dense_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of each adapter's values where the entries lie in the weight, by the weight's name."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "shira_weight"):
            (row, column), values = layer.shira_indices["default"].long(), layer.shira_weight["default"]
        elif hasattr(layer, "supertuning_values"):
            flat, values = layer.supertuning_indices["default"].long(), layer.supertuning_values["default"]
            row, column = flat // layer.in_features, flat % layer.in_features
        elif isinstance(layer, SparseLayer):
            support, values = layer.deltas["default"].support, layer.deltas["default"].weight
            row, column = support.row_of_entry(), support.indices.reshape(-1).long()
        else:
            continue
        found[name] = torch.zeros(layer.out_features, layer.in_features, device=values.device)
        found[name][row, column] = values.grad.reshape(-1).float()
    return found


def check(peer: nn.Module, converted: nn.Module, batch: dict[str, Tensor], tolerance: float) -> dict[str, float]:
    """How far the converted adapter is from the peer's: loss, and the worst gradient."""
    losses, gradients = [], []
    for model in (peer, converted):
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss))
        gradients.append(dense_gradients(model))
        model.zero_grad()
    theirs, ours = gradients
    if theirs.keys() != ours.keys():
        raise GateError("the converted model adapts other modules")
    errors = [float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs]
    found = {"loss": abs(losses[1] - losses[0]) / abs(losses[0]), "gradient": max(errors)}
    if not all(error <= tolerance for error in found.values()):
        raise GateError(f"the converted adapter differs: {found}, tolerance {tolerance}")
    return found


def measure(model: nn.Module, stepper: Stepper, device: torch.device) -> dict[str, int]:
    model.zero_grad()
    return {
        "saved_bytes": saved_bytes(model, lambda: model(**stepper.batch).loss),
        "peak_bytes": peak_bytes(stepper, device),
        "optimizer_bytes": stepper.optimizer_bytes(),
        "file_bytes": adapter_file_bytes(model),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    shape = shape_of(args)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    torch.set_num_threads(args.threads)
    base, batch = llama(shape, dtype, device), token_batch(shape, device)

    methods = {name: Method.parse(name) for name in dict.fromkeys([*args.peers, *REFERENCES])}
    models, checks = {}, {}
    for name in tqdm(args.peers, desc="building", unit="adapter"):
        models[name] = with_values(adapt(base, methods[name], LINEARS))
        models[f"{name} converted"] = convert(with_values(adapt(share(base), methods[name], LINEARS)))
        checks[name] = check(models[name], models[f"{name} converted"], batch, TOLERANCE[args.dtype])
        print(f"{name} converted: " + ", ".join(f"{what} off by {by:.1e}" for what, by in checks[name].items()))
    models |= {name: adapt(base, methods[name], LINEARS) for name in REFERENCES}

    steppers = {name: Stepper(model, batch) for name, model in models.items()}
    gc.collect()
    gc.disable()  # a collection would fall on some model's step
    try:
        times = interleave(steppers, args.steps, args.warmup, device)
    finally:
        gc.enable()
    results: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        origin = name.removesuffix(" converted")
        results[name] = {
            "trained_parameters": trained_parameters(model, methods[origin]),
            "seconds": asdict(Spread.of(times[name])),
            "over_frozen": asdict(pair_ratio(times[name], times["frozen"])),
            "over_origin": asdict(pair_ratio(times[name], times[origin])),
            "times": times[name],
            **measure(model, steppers[name], device),
        }
    rows = []
    for name, result in results.items():
        rows.append(
            {
                "step": name,
                "trained": f"{result['trained_parameters']:,}",
                "ms": f"{1000 * result['seconds']['median']:.1f}",
                "/ frozen": f"{result['over_frozen']['median']:.3f}",
                "/ its origin": f"{result['over_origin']['median']:.3f}" if name not in methods else "",
                "saved MiB": mebibytes(result["saved_bytes"]),
                "peak MiB": mebibytes(result["peak_bytes"]),
                "file MiB": mebibytes(result["file_bytes"]),
            }
        )
    print(f"\n{table(rows)}")
    report = {
        "environment": environment(device),
        "shape": asdict(shape),
        "dtype": args.dtype,
        "device": args.device,
        "gate": checks,
        "results": results,
    }
    if args.out is not None:
        write_report(args.out, report)
    return report


if __name__ == "__main__":
    main()
