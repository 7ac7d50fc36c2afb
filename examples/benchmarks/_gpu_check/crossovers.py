"""Which path is the fastest where: `crossover.py` at larger layers, in fp32, where "auto" has a choice."""

from __future__ import annotations

import argparse

import crossover
import torch

from .record import Record


SHAPES = ((1024, 1024), (4096, 4096), (14336, 4096))
TOKENS = (2048, 16)
TINY = [(16, 8, 1, 5), (16, 8, 4, 5)]


def run(record: Record, args: argparse.Namespace) -> None:
    points = [
        (rows, fan_in, max(1, round(share * fan_in)), tokens)
        for rows, fan_in in SHAPES
        for tokens in TOKENS
        for share in crossover.SHARES
    ]
    for uneven in (False, True):
        options = argparse.Namespace(uneven=uneven, dtype="float32", device=args.device, rounds=3, seconds=0.03)
        for point in TINY if args.tiny else points:
            record.attempt(
                {"uneven": uneven},
                lambda point=point, options=options: crossover.judged(
                    crossover.measure(point, options), options.uneven, torch.float32, record.device
                ),
            )
