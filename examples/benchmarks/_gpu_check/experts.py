"""`experts.py`, a training step on fused experts beside LoRA, at the blocks of Mixtral and of Qwen3-MoE."""

from __future__ import annotations

import argparse
from typing import Any

import experts as benchmark

from .record import Record, Row


BLOCKS = {
    "mixtral": {"hidden": 4096, "intermediate": 14336, "experts": 8, "per-token": 2},
    "qwen3_moe": {"hidden": 2048, "intermediate": 768, "experts": 128, "per-token": 8},
}
TINY = {"tiny": {"hidden": 16, "intermediate": 24, "experts": 4, "per-token": 2}}


def rows(sizes: dict[str, int], args: argparse.Namespace) -> list[Row]:
    """One row for each method."""
    options: dict[str, Any] = {**sizes, "device": args.device, "dtype": "float32" if args.tiny else "bfloat16"}
    options |= {"tokens": 6, "steps": 2} if args.tiny else {"tokens": 4096, "steps": 10}
    command = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    report = benchmark.main([*command, "--k", "1", *([] if args.tiny else ["20"])])
    return [{"method": name, **result} for name, result in report["results"].items()]


def run(record: Record, args: argparse.Namespace) -> None:
    for name, sizes in (TINY if args.tiny else BLOCKS).items():
        record.attempt({"block": name}, lambda sizes=sizes: rows(sizes, args))
