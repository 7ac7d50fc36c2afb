"""What the benchmarks do alike: arguments, the device, the times of a step, and the report."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from .arguments import at_least, device_name, out_file, positive
from .models import Shape
from .report import environment, write_report
from .steps import Spread, pair_ratio


DTYPES = ("float32", "bfloat16")


def parser_for(documentation: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with a script's documentation, line by line."""
    return argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_llama_sizes(parser: Any, least_tokens: int = 2) -> None:
    """Arguments for the sizes of a Llama; see [`llama_shape`]."""
    parser.add_argument("--hidden", type=positive, default=1024, help="width of the residual stream (%(default)s)")
    parser.add_argument("--intermediate", type=positive, default=2816, help="width of the MLP (%(default)s)")
    parser.add_argument("--layers", type=positive, default=4, help="decoder blocks (%(default)s)")
    parser.add_argument("--heads", type=positive, help="attention heads (hidden / 64)")
    parser.add_argument("--kv-heads", type=positive, help="heads of keys and values (as many as --heads)")
    parser.add_argument("--vocab", type=positive, default=1024, help="vocabulary, alike for all methods (%(default)s)")
    parser.add_argument("--batch", type=positive, default=4, help="sequences of a batch (%(default)s)")
    parser.add_argument(
        "--tokens", type=at_least(least_tokens), default=256, help="tokens of a sequence (%(default)s)"
    )


def llama_shape(args: argparse.Namespace) -> Shape:
    heads = args.heads or max(1, args.hidden // 64)
    return Shape(
        args.hidden, args.intermediate, args.layers, heads, args.vocab, args.batch, args.tokens, args.kv_heads
    )


def add_run(
    parser: argparse.ArgumentParser,
    dtypes: Sequence[str] = DTYPES,
    threads: int = 2,
    steps: int | None = None,
    warmup: int = 2,
) -> None:
    """Arguments for where a benchmark runs, with `steps` for how many steps it times, and where its report goes."""
    if dtypes:
        parser.add_argument("--dtype", choices=dtypes, default=dtypes[0], help="of the base (%(default)s)")
    parser.add_argument("--device", type=device_name, default="cpu", help="cpu, cuda or cuda:<n> (%(default)s)")
    parser.add_argument("--threads", type=positive, default=threads, help="CPU threads (%(default)s)")
    if steps is not None:
        rounds = "timed rounds, a step of each method (%(default)s)"
        parser.add_argument("--steps", type=positive, default=steps, help=rounds)
        parser.add_argument("--warmup", type=positive, default=warmup, help="rounds before (%(default)s)")
    parser.add_argument("--out", type=out_file, help="write everything, with the raw times, to this JSON file")


def begin(args: argparse.Namespace) -> tuple[torch.dtype, torch.device]:
    """Set the number of threads. Returns the dtype and the device that were asked for."""
    torch.set_num_threads(args.threads)
    return getattr(torch, getattr(args, "dtype", "float32")), torch.device(args.device)


def times_of(
    name: str, times: Mapping[str, list[float]], references: Sequence[str], trained_parameters: int
) -> dict[str, Any]:
    """The part of a report that says how long a step took, also over those of other methods in the same round."""
    return {
        "trained_parameters": trained_parameters,
        "seconds": asdict(Spread.of(times[name])),
        "ratios": {other: asdict(pair_ratio(times[name], times[other])) for other in references if other in times},
        "times": times[name],
    }


def time_row(name: str, result: Mapping[str, Any]) -> dict[str, str]:
    """A row of a table, from what [`times_of`] gave."""
    ratios = {
        f"/ {other} (quartiles)": "{median:.3f} ({lower:.3f}-{upper:.3f})".format(**ratio)
        for other, ratio in result["ratios"].items()
    }
    trained, median = result["trained_parameters"], result["seconds"]["median"]
    return {"step": name, "trained": f"{trained:,}", "ms": f"{1000 * median:.1f}", **ratios}


def run_apart(script: str, arguments: Sequence[str], threads: int) -> dict[str, Any]:
    """Run a script in a process of its own, whose last line is its result as JSON."""
    command = [sys.executable, script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed, see above; nothing is written")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def finish(args: argparse.Namespace, content: Mapping[str, Any]) -> dict[str, Any]:
    """The report: where the benchmark ran, and what it found; written if asked for."""
    setting = {name: getattr(args, name) for name in ("dtype", "device") if hasattr(args, name)}
    report = {"environment": environment(torch.device(getattr(args, "device", "cpu"))), **setting, **content}
    if args.out is not None:
        write_report(args.out, report)
    return report
