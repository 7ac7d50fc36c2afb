"""
Forward and backward of one layer by each path, over the share of inputs that a neuron trains.

    python examples/benchmarks/crossover.py                     # CPU, fp32, 2 threads, 1024 tokens

Shows where `backend="auto"` should change from folded to dense (`DENSE_ABOVE` in `peft_ext/sparse/ops/dispatch.py`).
Paths are interleaved; a cell is the median of the ratios to the frozen layer's own forward and input gradient.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from _common.report import environment, table
from _common.steps import pair_ratio
from torch import Tensor
from tqdm import tqdm

from peft_ext.sparse.ops import bypass, dense, folded
from peft_ext.sparse.support import Support


def passes(rows: int, fan_in: int, k: int, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """The frozen layer and the three paths, each as a function from nothing to the layer's output."""
    x = torch.randn(tokens, fan_in).to(dtype).requires_grad_(True)
    weight, values = torch.randn(rows, fan_in).to(dtype) / fan_in**0.5, torch.zeros(rows, k, requires_grad=True)
    indices = torch.rand(rows, fan_in).topk(k).indices.sort(1).values.to(torch.int32)
    transposed = Support(indices, fan_in).transposed()
    return {
        "frozen": lambda: F.linear(x, weight),
        "bypass": lambda: bypass(F.linear(x, weight), x, values, indices, None, *transposed),
        "folded": lambda: folded(x, weight, None, values, indices),
        "dense": lambda: dense(x, weight, None, values, indices, None),
    }


def seconds(forward: Callable[[], Tensor], grad: Tensor) -> float:
    begin = time.perf_counter()
    forward().backward(grad)
    return time.perf_counter() - begin


def main(argv: Sequence[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1024x1024", "2816x1024", "1024x2816"], metavar="ROWSxFAN_IN")
    parser.add_argument(
        "--shares", nargs="+", type=float, default=[0.001, 0.02, 0.1, 0.2, 0.25, 0.3, 0.5], help="k / fan-in"
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    results: list[dict[str, object]] = []
    for shape in tqdm(args.shapes, unit="shape"):
        rows, fan_in = map(int, shape.split("x"))
        for share in args.shares:
            k = max(1, round(share * fan_in))
            paths = passes(rows, fan_in, k, args.tokens, getattr(torch, args.dtype))
            grad = torch.randn(args.tokens, rows).to(getattr(torch, args.dtype))
            times: dict[str, list[float]] = {name: [] for name in paths}
            for turn in range(args.rounds + 1):
                for name, forward in paths.items():
                    elapsed = seconds(forward, grad)
                    if turn:  # the first round warms up
                        times[name].append(elapsed)
            ratios = {name: pair_ratio(times[name], times["frozen"]).median for name in paths if name != "frozen"}
            results.append({"shape": shape, "k": k, "share": k / fan_in, **ratios})
    lines = [{key: f"{v:.3f}" if isinstance(v, float) else str(v) for key, v in row.items()} for row in results]
    print(table(lines))
    if args.out is not None:
        report = {"environment": environment(torch.device("cpu")), "results": results}
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
