"""
Bandwidth of the bypass's products, beside what the device reaches in a plain copy measured in the same run.

    python examples/benchmarks/ops.py --device cuda             # Llama-3-8B's layers, bf16, 1024 and 8192 tokens
    python examples/benchmarks/ops.py --shapes 256x128 --tokens 64 --dtype float32      # a look on the CPU

Bytes are those that any implementation has to move once: the activations that a product reads and writes, the indices
and the values. What caches save or repeat does not count, so shares of the copy's bandwidth are comparable between k.
Every product is compared with dense matrices in fp64 first; if one differs, nothing is timed. On a CPU inputs rotate
through more memory than the caches hold; on a GPU its cache is emptied before each call, and calls are replayed from a
CUDA graph, so that the time is the device's and not that of launching. Beside a large copy stands one that moves as
many bytes as the product: a few tokens are over before any device is at its bandwidth.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _common.arguments import positive
from _common.report import table
from _common.runner import add_run, begin, finish, parser_for
from torch import Tensor
from tqdm import tqdm

from peft_ext.sparse.ops import gpu
from peft_ext.sparse.ops.bypass import bypass, sparse_grad_input, sparse_grad_values
from peft_ext.sparse.ops.reference import dense_delta
from peft_ext.sparse.support import Support


# Rows x fan-in of Llama-3-8B: q and o, k and v, gate and up, down.
SHAPES = ("4096x4096", "1024x4096", "14336x4096", "4096x14336")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def shape(text: str) -> tuple[int, int]:
    rows, _, fan_in = text.partition("x")
    try:
        return positive(rows), positive(fan_in)
    except argparse.ArgumentTypeError:
        message = f"must be ROWSxFAN_IN, two positive integers such as {SHAPES[0]}, got {text}"
        raise argparse.ArgumentTypeError(message) from None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_for(__doc__)
    shapes = list(map(shape, SHAPES))
    help = f"({' '.join(SHAPES)})"
    parser.add_argument("--shapes", nargs="+", type=shape, default=shapes, metavar="ROWSxFAN_IN", help=help)
    parser.add_argument("--tokens", nargs="+", type=positive, default=[1024, 8192], help="(%(default)s)")
    parser.add_argument("--k", nargs="+", type=positive, default=[1, 4, 20], help="entries per neuron (%(default)s)")
    add_run(parser, dtypes=("float32", "bfloat16", "float16"))
    parser.set_defaults(dtype="bfloat16")
    parser.add_argument("--rounds", type=positive, default=20, help="timed rounds over all input sets (%(default)s)")
    parser.add_argument("--working-set", type=positive, default=512, help="MiB that the input sets fill (%(default)s)")
    args = parser.parse_args(argv)
    for rows, fan_in in args.shapes:
        if max(args.k) > fan_in:
            parser.error(f"--k {max(args.k)} is above the fan-in of --shapes {rows}x{fan_in}: leave one of them out")
    return args


def seconds(works: Sequence[Callable[[], object]], rounds: int, device: torch.device) -> float:
    """Median over rounds of the mean time of one work; on a GPU of many calls of the first one."""
    if device.type == "cuda":
        return device_seconds(works[0], device)
    for work in works:
        work()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for work in works:
            work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) / len(works)


def device_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median of many calls without what launching them takes, each after the cache was emptied."""
    from triton.testing import do_bench

    with torch.cuda.device(device):
        work()  # compiles and chooses
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return do_bench(graph.replay, warmup=5, rep=30, return_mode="median") / 1000


def copy_seconds(moved: int, rounds: int, device: torch.device) -> float:
    """Time of a copy that reads and writes so many bytes together."""
    source = torch.ones(max(1, moved // 8), device=device)
    target = torch.empty_like(source)
    return seconds([lambda: target.copy_(source)], rounds, device)


def copy_bandwidth(device: torch.device, rounds: int, mebibytes: int) -> float:
    """Bytes read and written per second by a large copy."""
    moved = 2 * mebibytes * 2**20
    return moved / copy_seconds(moved, rounds, device)


class Layer:
    """One sparse update at one shape, and several sets of activations for it."""

    def __init__(self, rows: int, fan_in: int, k: int, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        scores = torch.rand(rows, fan_in, generator=generator, device=device)
        self.support = Support(scores.topk(k).indices.sort(1).values.to(torch.int32), fan_in)
        self.values = torch.randn(rows, k, generator=generator, device=device)
        self.transposed = self.support.transposed()
        self.sizes, self.dtype, self.device = (tokens, rows, fan_in), dtype, device

    def activations(self, seed: int) -> tuple[Tensor, Tensor]:
        """`x` and something as large as the output: the base layer's result, or a gradient."""
        tokens, rows, fan_in = self.sizes
        generator = torch.Generator(self.device).manual_seed(seed)
        return tuple(  # type: ignore[return-value]
            torch.randn(tokens, width, generator=generator, device=self.device).to(self.dtype)
            for width in (fan_in, rows)
        )

    def products(self, x: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
        indices = self.support.indices
        in_place: dict[str, Callable[[], Tensor]] = {}
        if gpu.usable(x):
            in_place["forward in place"] = lambda: gpu.kernels().add(y, x, self.values, indices, None, y)
        return {
            **in_place,
            "forward": lambda: bypass(y, x, self.values, indices, None, *self.transposed),
            "grad values": lambda: sparse_grad_values(y, x, indices, None, *self.transposed, None, []),
            "grad input": lambda: sparse_grad_input(
                y, x.shape[1:], self.dtype, self.values, indices, None, *self.transposed, None, []
            ),
        }

    def bytes(self) -> dict[str, int]:
        """What each product has to read and write once."""
        tokens, rows, fan_in = self.sizes
        y, x = (tokens * width * self.dtype.itemsize for width in (rows, fan_in))
        table_bytes = 4 * self.values.numel()
        return {
            "forward": 2 * y + x + 2 * table_bytes,
            "forward in place": 2 * y + x + 2 * table_bytes,
            "grad values": y + x + 2 * table_bytes,
            "grad input": y + x + 2 * table_bytes + 4 * fan_in,
        }

    def check(self) -> dict[str, float]:
        """Largest error of each product relative to the largest entry of the dense fp64 result."""
        x, y = self.activations(seed=10**6)
        update = dense_delta(self.values.double(), self.support.indices, self.support.fan_in)
        exact = {
            "forward": y.double() + x.double() @ update.t(),
            "grad values": self.support.gather(y.double().t() @ x.double()),
            "grad input": y.double() @ update,
        }
        exact["forward in place"] = exact["forward"]
        errors = {}
        for name in self.products(x, y):
            found = self.products(x, y.clone())[name]()  # a copy for each: one writes into it
            errors[name] = ((found.double() - exact[name]).abs().max() / exact[name].abs().max()).item()
            bound = TOLERANCE[self.dtype]
            if not errors[name] <= bound:  # a NaN fails
                raise RuntimeError(f"{name} at {self.sizes} is off by {errors[name]}, over {bound}: nothing is timed")
        return errors


def chosen() -> dict[str, str]:
    """The configurations that were measured to be the fastest, by their keys."""
    if not torch.cuda.is_available():
        return {}
    from peft_ext.sparse.ops.gpu import tuning

    return {str(key): str(config) for key, config in tuning._chosen.items()}


def measured(layer: Layer, copy: float, rounds: int, mebibytes: int) -> list[dict[str, Any]]:
    """Time and bandwidth of each product of a layer; `mebibytes`: what its sets of inputs fill on a CPU."""
    errors, moved_bytes, device = layer.check(), layer.bytes(), layer.device
    tokens, rows, fan_in = layer.sizes
    each = tokens * (rows + fan_in) * layer.dtype.itemsize
    count = 1 if device.type == "cuda" else max(2, -(-mebibytes * 2**20 // each))
    products = [layer.products(*layer.activations(seed)) for seed in range(count)]
    copies = {moved: copy_seconds(moved, rounds, device) for moved in {moved_bytes[name] for name in products[0]}}
    results = []
    for name in products[0]:
        moved = moved_bytes[name]
        elapsed = seconds([product[name] for product in products], rounds, device)
        results.append(
            {
                "product": name, "rows": rows, "fan_in": fan_in, "k": layer.values.shape[1], "tokens": tokens,
                "microseconds": 1e6 * elapsed, "bytes": moved, "bytes_per_second": moved / elapsed,
                "share_of_copy": moved / elapsed / copy, "share_of_same_copy": copies[moved] / elapsed,
                "error": errors[name],
            }
        )  # fmt: skip
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    dtype, device = begin(args)
    copy = copy_bandwidth(device, args.rounds, args.working_set)
    results: list[dict[str, Any]] = []
    cases = [(*sizes, k, tokens) for sizes in args.shapes for k in args.k for tokens in args.tokens]
    for rows, fan_in, k, tokens in tqdm(cases, unit="case"):
        layer = Layer(rows, fan_in, k, tokens, dtype, device)
        results += measured(layer, copy, args.rounds, args.working_set)
    lines = [
        {
            "product": str(row["product"]),
            **{name: str(row[name]) for name in ("rows", "fan_in", "k", "tokens")},
            "µs": f"{row['microseconds']:.1f}",
            "GB/s": f"{row['bytes_per_second'] / 1e9:.1f}",
            "/ copy": f"{row['share_of_copy']:.2f}",
            "/ same copy": f"{row['share_of_same_copy']:.2f}",
        }
        for row in results
    ]
    print(f"copy: {copy / 1e9:.1f} GB/s\n{table(lines)}")
    kernels = "triton" if device.type == "cuda" and gpu.triton_supports(device) else "torch"
    found = {"kernels": kernels, "copy_bytes_per_second": copy, "results": results, "configurations": chosen()}
    return finish(args, found)


if __name__ == "__main__":
    main()
