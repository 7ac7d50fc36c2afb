"""What comes before the first step: choosing and loading adapters for a model of Llama-3-8B's shapes."""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from _common.methods import Method, peft_config, share, targeted
from _common.models import LINEARS, llama
from _common.steps import timed
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from .record import Record, Row
from .steps import BLOCKS, TINY


METHODS = ("neuroada-k1", "lora-r8", "neuroada-k20")


@contextmanager
def peak(row: Row, name: str, device: torch.device) -> Iterator[None]:
    """Note what was allocated at once on the GPU, above what was there before."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield
    row[name] = torch.cuda.max_memory_allocated(device) - before


def one_pass(base: nn.Module) -> list[Tensor]:
    """What choosing is measured by: one reading of the weights."""
    return [linear.weight.detach().abs().amax(1) for linear in targeted(base, LINEARS)]


def startup(base: nn.Module, name: str, device: torch.device) -> Row:
    """Seconds of choosing, saving, loading, merging and unmerging; peaks on a GPU."""
    method = Method.parse(name)
    config = peft_config(method, list(targeted(base, LINEARS)), LINEARS)
    row: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        with peak(row, "choosing_peak_bytes", device):
            model, row["choosing"] = timed(lambda: get_peft_model(share(base), config), device)
        _, row["saving"] = timed(partial(model.save_pretrained, folder), device)
        row["file_bytes"] = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        _, row["merging"] = timed(model.merge_adapter, device)
        _, row["unmerging"] = timed(model.unmerge_adapter, device)
        del model
        gc.collect()
        with peak(row, "loading_peak_bytes", device):
            _, row["loading"] = timed(lambda: PeftModel.from_pretrained(share(base), folder), device)
    return row


def run(record: Record, args: argparse.Namespace) -> None:
    shape = TINY if args.tiny else replace(BLOCKS, layers=32)
    base = llama(shape, torch.bfloat16, record.device)
    record.content["weights"] = sum(linear.weight.numel() for linear in targeted(base, LINEARS))
    one_pass(base)
    record.attempt({"method": "one pass"}, lambda: {"choosing": timed(lambda: one_pass(base), record.device)[1]})
    for again in range(1 if args.tiny else 2):  # the first round starts libraries up
        for name in METHODS:
            record.attempt({"method": name, "round": again}, lambda name=name: startup(base, name, record.device))
