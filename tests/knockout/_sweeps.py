"""Sweeps by each engine, compared."""

import torch

from peft_ext.knockout import layer_sweep


PAIRS = ["image:question", "question:last", "last:last", "image:last", "question:question"]
FAST = ["suffix", "packed"]


def sweep(model, sample, engine, pairs=PAIRS, **options):
    """Log-probabilities of the answer, `[records]`, and the records."""
    options = {"window": 2, "self_check": False, "progress": False, **options}
    records = layer_sweep(model, [sample], pairs, engine=engine, **options)
    assert {record["engine"] for record in records} == {engine}
    return torch.tensor([record["probability"] for record in records]).log(), records


def assert_same(model, sample, **options):
    expected, records = sweep(model, sample, "full", **options)
    for engine in FAST:
        found, _ = sweep(model, sample, engine, **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    return records
