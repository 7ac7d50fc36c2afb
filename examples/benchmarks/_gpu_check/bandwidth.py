"""`ops.py` at the shapes of Llama-3-8B, down to one token."""

from __future__ import annotations

import argparse

import ops
import torch

from .record import Record


SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
TINY = ((8, 6),)


def run(record: Record, args: argparse.Namespace) -> None:
    copy = ops.copy_bandwidth(record.device, rounds=3, mebibytes=1 if args.tiny else 1024)
    record.content["copy_bytes_per_second"] = copy
    print(f"copy: {copy / 1e9:.0f} GB/s", flush=True)
    cases = [
        (rows, fan_in, k, tokens, dtype)
        for dtype in ("bfloat16", "float32")
        for k in (1, 20, 4)
        for tokens in ((5,) if args.tiny else (1024, 1, 8192))
        for rows, fan_in in (TINY if args.tiny else SHAPES)
    ]
    for rows, fan_in, k, tokens, dtype in cases:
        if k > fan_in:
            continue
        layer = (rows, fan_in, k, tokens, getattr(torch, dtype), record.device)
        record.attempt(
            {"dtype": dtype}, lambda layer=layer: ops.measured(ops.Layer(*layer), copy, rounds=2, mebibytes=0)
        )
        record.content["configurations"] = ops.chosen()
    record.write()
