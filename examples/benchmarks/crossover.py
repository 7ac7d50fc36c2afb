"""
Which path is the fastest, bypass, folded or dense, over a grid of (rows, fan-in, k, tokens), and does "auto" take it?

    python examples/benchmarks/crossover.py --out examples/benchmarks/results/crossover_cpu_fp32.json
    python examples/benchmarks/crossover.py --uneven --out examples/benchmarks/results/crossover_uneven_cpu_fp32.json
    python examples/benchmarks/crossover.py --device cuda --out examples/benchmarks/results/crossover_cuda_fp32.json

The numbers in `peft_ext/sparse/ops/crossovers.py` come from it. A point is a forward and backward pass of one layer
with gradients of x and of the values. Layers of one size are visited in turn, so that a weight lies in no cache, as in
a model. Paths are interleaved, and the grid is gone through several times, so that a slow spell of the machine does
not meet one point alone; a path's time is its shortest, since whatever else runs on the machine only adds to it.
`--points 0:50` measures a part; what the file of `--out` already holds is not measured again, so that an interrupted
run goes on. `--report` measures nothing and prints what the file holds: how often "auto", as the package now decides,
is within 10 % of the best path, and where it is worst.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _common.arguments import positive, refusing
from _common.report import table
from _common.runner import add_run, begin, finish, parser_for
from _common.steps import synchronise
from torch import Tensor
from tqdm import tqdm

from peft_ext.sparse.ops import add_in_place, bypass, choose_backend, dense, folded, may_add_in_place
from peft_ext.sparse.support import Support, support_of


PATHS = ("bypass", "folded", "dense")
SHAPES = ((256, 256), (1024, 256), (1024, 1024), (2816, 1024), (1024, 2816))
SHARES = (0.0, 0.02, 0.08, 0.15, 0.4)  # of the fan-in; the first is k = 1
TOKENS = (1, 16, 128, 1024)
GRID = [
    (rows, fan_in, max(1, round(share * fan_in)), tokens)
    for tokens in TOKENS
    for rows, fan_in in SHAPES
    for share in SHARES
]
SIZES = ("rows", "fan_in", "k", "tokens")
WITHIN = 1.1
# Layers that are visited in turn hold so many bytes of weights, more than caches do, but are no more than so many.
COLD_BYTES = 128 * 2**20
MOST_LAYERS = 256


def random_support(rows: int, fan_in: int, k: int, uneven: bool, generator: torch.Generator) -> Support:
    """k entries of each row, or as many anywhere in the weight."""
    if not uneven:
        indices = torch.rand(rows, fan_in, generator=generator, device=generator.device).topk(k).indices
        return Support(indices.sort(1).values.to(torch.int32), fan_in)
    positions = torch.randperm(rows * fan_in, generator=generator, device=generator.device)[: rows * k]
    return support_of(positions.sort().values, rows, fan_in)


class Layers:
    """
    Layers of one size, visited in turn, so that each call finds its weight, values and support out of the caches, as
    in a step of a model whose other layers were used since.
    """

    def __init__(self, point: tuple[int, ...], uneven: bool, dtype: torch.dtype, device: torch.device) -> None:
        rows, fan_in, k, tokens = point
        generator = torch.Generator(device).manual_seed(0)
        draw = partial(torch.randn, generator=generator, device=device)
        self.x = draw(tokens, fan_in).to(dtype).requires_grad_(True)
        self.grad = draw(tokens, rows).to(dtype)
        weight = (draw(rows, fan_in) / fan_in**0.5).to(dtype)
        support = random_support(rows, fan_in, k, uneven, generator)
        values = torch.zeros(support.indices.shape, device=device)
        tables = support.transposed()
        count = max(2, min(MOST_LAYERS, -(-COLD_BYTES // weight.nbytes)))
        self.layers = itertools.cycle(
            [
                (
                    weight.clone(),
                    values.clone().requires_grad_(True),
                    support.indices.clone(),
                    None if support.offsets is None else support.offsets.clone(),
                    tuple(table.clone() for table in tables),
                )
                for _ in range(count)
            ]
        )

    def _bypass(
        self, weight: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None, tables: tuple[Tensor, ...]
    ) -> Tensor:
        result = F.linear(self.x, weight)
        add = add_in_place if may_add_in_place(result, self.x, values) else bypass
        return add(result, self.x, values, indices, offsets, *tables)

    def seconds(self, path: str) -> float:
        """Of a forward and backward pass of the next layer."""
        weight, values, indices, offsets, tables = next(self.layers)
        self.x.grad = values.grad = None
        synchronise(self.x.device)
        begin = time.perf_counter()
        if path == "bypass":
            y = self._bypass(weight, values, indices, offsets, tables)
        else:
            y = {"folded": folded, "dense": dense}[path](self.x, weight, None, values, indices, offsets)
        y.backward(self.grad)
        synchronise(self.x.device)
        return time.perf_counter() - begin


def measure(point: tuple[int, ...], args: argparse.Namespace) -> dict[str, Any]:
    """The shortest seconds of each path at one point."""
    layers = Layers(point, args.uneven, getattr(torch, args.dtype), torch.device(args.device))
    times: dict[str, list[float]] = {name: [] for name in PATHS}
    for name in PATHS:  # warms up
        layers.seconds(name)
    begin = time.perf_counter()
    while len(times["dense"]) < args.rounds or (time.perf_counter() - begin < args.seconds):
        for name in PATHS:
            times[name].append(layers.seconds(name))
    shortest = {name: min(sample) for name, sample in times.items()}
    return {**dict(zip(SIZES, point, strict=True)), "passes": 1, "seconds": shortest}


def joined(first: dict[str, Any] | None, second: dict[str, Any]) -> dict[str, Any]:
    """Two measurements of one point."""
    if first is None:
        return second
    shortest = {name: min(time, second["seconds"][name]) for name, time in first["seconds"].items()}
    return {**first, "passes": first["passes"] + second["passes"], "seconds": shortest}


def auto(result: dict[str, Any], uneven: bool, dtype: torch.dtype, device: torch.device) -> str:
    """The path that the package takes in training."""
    x = torch.empty(result["tokens"], result["fan_in"], dtype=dtype, device=device)
    weight = torch.empty(result["rows"], result["fan_in"], dtype=dtype, device=device)
    return choose_backend("auto", x, weight, result["rows"] * result["k"], result["rows"], not uneven)


def judged(result: dict[str, Any], uneven: bool, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    best = min(result["seconds"].values())
    path = auto(result, uneven, dtype, device)
    return {**result, "auto": path, "auto_over_best": result["seconds"][path] / best}


def print_report(results: Sequence[dict[str, Any]]) -> None:
    lines = [
        {
            **{name: str(result[name]) for name in SIZES},
            **{f"{path}, ms": f"{1000 * result['seconds'][path]:.3f}" for path in PATHS},
            "auto": result["auto"],
            "/ best": f"{result['auto_over_best']:.2f}",
        }
        for result in results
    ]
    print(table(lines))
    near = sum(result["auto_over_best"] <= WITHIN for result in results)
    worst = max(results, key=lambda result: result["auto_over_best"])
    where = ", ".join(f"{name} {worst[name]}" for name in SIZES)
    print(f"auto is within 10 % of the best path at {near} of {len(results)} points")
    print(f"at worst it takes {worst['auto_over_best']:.2f} times the best: {where}")


def part(text: str) -> slice:
    """Type of a part of the grid."""
    match = re.fullmatch(r"(\d*):(\d*)", text)
    first, last = (int(match[1] or 0), int(match[2] or len(GRID))) if match else (0, 0)
    if not first < last <= len(GRID):
        raise argparse.ArgumentTypeError(f"{text!r} is not FROM:TO within 0:{len(GRID)}: pass such")
    return slice(first, last)


def duration(text: str) -> float:
    """Type of a number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds: pass one from 0 on")
    return value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_for(__doc__)
    points = f"of the grid's {len(GRID)} points (all)"
    parser.add_argument("--points", type=part, default=slice(None), metavar="FROM:TO", help=points)
    parser.add_argument("--uneven", action="store_true", help="as many entries anywhere in the weight, not k per row")
    parser.add_argument("--passes", type=positive, default=4, help="times that the grid is gone through (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=5, help="at least so many rounds at a point (%(default)s)")
    parser.add_argument("--seconds", type=duration, default=0.4, help="and at least so long (%(default)s)")
    add_run(parser)
    parser.add_argument("--report", action="store_true", help="measure nothing, print what --out holds")
    args = parser.parse_args(argv)
    with refusing(parser):
        args.earlier = earlier(args)
    return args


def earlier(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The results that the file of `--out` holds already."""
    if args.report and args.out is None:
        raise ValueError("--report prints what a file holds: name it by --out")
    if args.out is None or not args.out.exists():
        if args.report:
            raise ValueError(f"--out {args.out} does not exist: --report prints what a file holds")
        return []
    try:
        report = json.loads(args.out.read_text())
        device = "cpu" if report["environment"]["accelerator"] is None else "cuda"
        threads = report["environment"]["threads"]
        kind = {"dtype": report["dtype"], "uneven": report["uneven"], "device": device}
        results: list[dict[str, Any]] = [
            {
                **{name: int(result[name]) for name in (*SIZES, "passes")},
                "seconds": {path: float(result["seconds"][path]) for path in PATHS},
            }
            for result in report["results"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--out {args.out} holds no results of this script: name another file") from error
    asked = {"dtype": args.dtype, "uneven": args.uneven, "device": torch.device(args.device).type}
    if not args.report and device == "cpu":  # what is judged does not depend on it, what is measured does
        kind["threads"], asked["threads"] = threads, args.threads
    if kind != asked:
        held = ", ".join(f"{name} {value}" for name, value in kind.items())
        raise ValueError(f"--out {args.out} holds results of another kind ({held}): name another file")
    if args.report and not any(tuple(result[name] for name in SIZES) in GRID for result in results):
        raise ValueError(f"--out {args.out} holds no point of the grid: measure some first")
    return results


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    dtype, device = begin(args)
    known = {tuple(r[name] for name in SIZES): r for r in args.earlier}
    todo = [
        point
        for number in range(0 if args.report else args.passes)
        for point in GRID[args.points]
        if point not in known or known[point]["passes"] <= number
    ]
    for point in tqdm(todo, unit="point"):
        known[point] = joined(known.get(point), measure(point, args))
        if args.out is not None:
            results = [known[p] for p in GRID if p in known]
            finish(args, {"uneven": args.uneven, "results": results})
    results = [judged(known[point], args.uneven, dtype, device) for point in GRID if point in known]
    print_report(results)
    return results


if __name__ == "__main__":
    main()
