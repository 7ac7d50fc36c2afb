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
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from _common.arguments import refusing
from _common.methods import Method, adapt, share, trained_parameters
from _common.models import LINEARS, llama, token_batch
from _common.report import mebibytes, table
from _common.runner import add_llama_sizes, add_run, begin, finish, llama_shape, parser_for
from _common.step_memory import model_memory
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
    parser = parser_for(__doc__)
    add_llama_sizes(parser, least_tokens=3)
    add_run(parser, dtypes=tuple(TOLERANCE), steps=10)
    parser.add_argument("--peers", nargs="+", default=PEERS, metavar="METHOD", help=f"({' '.join(PEERS)})")
    args = parser.parse_args(argv)
    with refusing(parser):
        llama_shape(args)
        for name in args.peers:
            if Method.parse(name).kind not in ("shira", "supertuning"):
                raise ValueError(f"`peers` contains {name!r}: use shira-k<k> or supertuning-k<k>")
    return args


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


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    shape, (dtype, device) = llama_shape(args), begin(args)
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
    times = interleave(steppers, args.steps, args.warmup, device)
    results: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        origin = name.removesuffix(" converted")
        results[name] = {
            "trained_parameters": trained_parameters(model, methods[origin]),
            "seconds": asdict(Spread.of(times[name])),
            "over_frozen": asdict(pair_ratio(times[name], times["frozen"])),
            "over_origin": asdict(pair_ratio(times[name], times[origin])),
            "times": times[name],
            **model_memory(model, steppers[name], device),
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
    return finish(args, {"shape": asdict(shape), "gate": checks, "results": results})


if __name__ == "__main__":
    main()
