"""A training step at the blocks of Llama-3-8B, method by method, without and with checkpointing."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

import ops
import torch
from _common.gate import gate
from _common.memory import peak_bytes, resident_bytes
from _common.methods import Method, adapt, trained_parameters
from _common.models import LINEARS, PRESETS, Shape, llama, token_batch
from _common.steps import Spread, Stepper, interleave
from torch import nn

from .record import Record, Row, free, said


# Those of a group are timed together; what is most wanted comes first.
GROUPS = [
    ("frozen", "neuroada-k1", "lora-r8"),
    ("frozen", "neuroada-k20", "lora-r8"),
    ("supertuning-k20",),
    ("masked-k20",),
    ("frozen", "neuroada-k4", "neuroada-k20@dense"),
]
# SHiRA draws its masks on the CPU, a minute for 16 blocks: beside these methods in a model of a few.
SLOW_TO_BUILD = ("frozen", "neuroada-k20", "lora-r8", "shira-k20")
FEW = 2
# A small vocabulary, so that the head, alike for every method, does not dilute the ratios.
BLOCKS = Shape(**(PRESETS["llama-3-8b"] | {"layers": 16, "vocab": 1024}), batch=4, tokens=1024)
TINY = Shape(hidden=32, intermediate=48, layers=2, heads=2, vocab=64, batch=2, tokens=8)


def measured(models: dict[str, nn.Module], methods: list[Method], shape: Shape, args: argparse.Namespace) -> list[Row]:
    """Times and bytes of some models' steps, interleaved."""
    device = torch.device(args.device)
    batch = token_batch(shape, device)
    steppers = {name: Stepper(model, batch) for name, model in models.items()}
    times = interleave(steppers, 2 if args.tiny else 10, 1 if args.tiny else 3, device)
    rows = []
    for method in methods:
        name = method.name
        row: dict[str, Any] = {"method": name, "milliseconds": 1000 * Spread.of(times[name]).median}
        for other in ("lora-r8", "frozen"):
            if other in times:
                row[f"over {other}"] = Spread.of(times[name]).median / Spread.of(times[other]).median
        row |= {
            "peak_bytes": peak_bytes(steppers[name], device),
            "resident_bytes": resident_bytes(models[name]),
            "optimizer_bytes": steppers[name].optimizer_bytes(),
            "trained_parameters": trained_parameters(models[name], method),
            "times": times[name],
        }
        rows.append(row)
    return rows


def group_rows(base: nn.Module, names: tuple[str, ...], shape: Shape, args: argparse.Namespace) -> list[Row]:
    methods = [Method.parse(name) for name in names]
    models = {method.name: adapt(base, method, LINEARS) for method in methods}
    return measured(models, methods, shape, args)


def gated(record: Record, shape: Shape, dtype: torch.dtype) -> None:
    """NeuroAda on this device against the dense reference: kept, and gone on after whatever it says."""
    small = replace(shape, batch=1, tokens=min(shape.tokens, 256))
    try:
        checks = [asdict(check) | {"passed": check.passed} for check in gate(small, dtype, record.device)]
    except Exception as error:
        record.content["gate"] = said(error)
        print(f"gate: {said(error)}", flush=True)
        free(record.device)
    else:
        record.content["gate"] = checks
        failed = [check for check in checks if not check["passed"]]
        print(f"gate: {len(checks) - len(failed)} of {len(checks)} passed {failed}", flush=True)
    record.write()


def run(record: Record, args: argparse.Namespace) -> None:
    shape = TINY if args.tiny else replace(BLOCKS, layers=args.layers)
    dtype = torch.float32 if args.tiny else torch.bfloat16
    record.content |= {"shape": asdict(shape), "dtype": str(dtype)[6:]}
    gated(record, shape, dtype)
    base = llama(shape, dtype, record.device)
    for checkpointing in (False, True):
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        for names in GROUPS:
            case = {"layers": shape.layers, "checkpointing": checkpointing}
            record.attempt(case, lambda names=names: group_rows(base, names, shape, args))
            record.content["configurations"] = ops.chosen()
            free(record.device)
    few = replace(shape, layers=FEW)
    record.attempt(
        {"layers": FEW, "checkpointing": False},
        lambda: group_rows(llama(few, dtype, record.device), SLOW_TO_BUILD, few, args),
    )
