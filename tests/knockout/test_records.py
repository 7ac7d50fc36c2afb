"""Results on disk: resumed after an interruption, refused for other settings, shared by processes."""

import os

import pytest

from peft_ext.knockout import FlowSample, LazySample, layer_sweep, read_records
from peft_ext.knockout.sweep.sweep import Sweep
from tests._models.vision_language import LAYERS, build, grouped, row
from tests._processes import launch


PAIRS = ["image:question", "question:last"]
OPTIONS = {"window": 2, "engine": "packed", "self_check": False, "progress": False}


def samples():
    batch, groups = grouped("llava", texts=((3, 7), (5, 7), (4, 9)), padding="right")
    made = [row(batch, groups, number) for number in range(3)]
    return [FlowSample(single, own, names=[f"s{n}"], info={"task": "t"}) for n, (single, own) in enumerate(made)]


def ordered(records):
    return sorted(records, key=lambda record: [record[name] for name in ("sample", "pair", "layer")])


def test_the_file_holds_what_is_returned(tmp_path):
    path = tmp_path / "new" / "sweep.jsonl"
    records = layer_sweep(build(), samples(), PAIRS, output=path, **OPTIONS)
    assert read_records(path) == records and len(records) == 3 * len(PAIRS) * LAYERS
    for record in records:
        change = 100 * (record["probability"] / record["base_probability"] - 1)
        assert record["change_percent"] == pytest.approx(change, abs=1e-4)
        assert all(isinstance(value, (str, int, float)) for value in record.values())
        assert record["pair"] == f"{record['source']}:{record['target']}" and record["task"] == "t"


@pytest.mark.parametrize("cut", ["line", "record", "sample"])
def test_an_interrupted_sweep_continues(tmp_path, monkeypatch, cut):
    path, model = tmp_path / "sweep.jsonl", build()
    whole = layer_sweep(model, samples(), PAIRS, output=path, **OPTIONS)
    lines = path.read_text().splitlines(keepends=True)
    kept = {"line": "".join(lines[:10])[:-30], "record": "".join(lines[:10]), "sample": "".join(lines[:6])}[cut]
    path.write_text(kept)
    ran, run = [], Sweep.run
    monkeypatch.setattr(Sweep, "run", lambda own, prompt, sample: ran.extend(prompt.names) or run(own, prompt, sample))
    records = layer_sweep(model, samples(), PAIRS, output=path, **OPTIONS)
    assert ran == ["s1", "s2"]
    assert records == whole == read_records(path)
    layer_sweep(model, samples(), PAIRS, output=path, **OPTIONS)
    assert ran == ["s1", "s2"]


def test_an_exception_keeps_what_was_done(tmp_path):
    path = tmp_path / "sweep.jsonl"
    broken = samples()
    broken[1].groups["image"][:] = False
    with pytest.raises(ValueError, match=r"sample s1: group 'image' holds no token in row\(s\) \[0\]"):
        layer_sweep(build(), broken, PAIRS, output=path, **OPTIONS)
    assert {record["sample"] for record in read_records(path)} == {"s0"}


def test_lazy_samples_are_made_when_needed(tmp_path):
    path, made = tmp_path / "sweep.jsonl", []

    def lazy(number):
        def make():
            made.append(number)
            return None if number == 1 else samples()[number]

        return LazySample(f"s{number}", make)

    records = layer_sweep(build(), [lazy(n) for n in range(3)], PAIRS, output=path, **OPTIONS)
    assert made == [0, 1, 2] and {record["sample"] for record in records} == {"s0", "s2"}
    layer_sweep(build(), [lazy(n) for n in range(3)], PAIRS, output=path, **OPTIONS)
    assert made == [0, 1, 2, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 3}, "other settings"),
        ({"mode": "forward"}, "other settings"),
        ({"layers": [0]}, "other pairs"),
        ({"pairs": ["image:question", "image:last"]}, "other pairs"),
        ({"pairs": PAIRS[:1]}, "other pairs"),
        ({"pairs": [*PAIRS, "image:last"]}, "lacks pairs or layers"),
    ],
)
def test_another_sweep_is_not_continued(tmp_path, options, message):
    """Nor one that has as many pairs and layers, but others."""
    path = tmp_path / "sweep.jsonl"
    layer_sweep(build(), samples(), PAIRS, output=path, **OPTIONS)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        layer_sweep(build(), samples(), output=path, **{**OPTIONS, "pairs": PAIRS, **options})
    assert path.read_bytes() == before


def test_a_batch_that_was_cut_off_between_its_rows_continues(tmp_path):
    path, model = tmp_path / "sweep.jsonl", build()
    batch = FlowSample(*grouped("llava"), names=["a", "b"])
    whole = layer_sweep(model, batch, PAIRS, output=path, **OPTIONS)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2 + 2]) + lines[-1][:20])
    for _ in range(2):
        assert layer_sweep(model, batch, PAIRS, output=path, **OPTIONS) == whole == read_records(path)


def test_what_another_process_left_behind_is_joined(tmp_path):
    """A killed process's file, with a whole sample, part of another and part of a line."""
    path, model = tmp_path / "sweep.jsonl", build()
    whole = layer_sweep(model, samples(), PAIRS, output=path, **OPTIONS)
    lines = path.read_text().splitlines(keepends=True)
    path.unlink()
    (tmp_path / "sweep.process3.jsonl").write_text("".join(lines[:9]) + lines[9][:20])
    for _ in range(2):
        found = layer_sweep(model, samples(), PAIRS, output=path, **OPTIONS)
        for records in (found, read_records(path)):
            assert ordered(records) == ordered(whole)
    assert os.listdir(tmp_path) == ["sweep.jsonl"]


def test_names_and_columns_are_not_taken_twice():
    twice = [samples()[0], samples()[0]]
    with pytest.raises(ValueError, match=r"samples\[1\] has the name 's0', as an earlier one"):
        layer_sweep(build(), twice, PAIRS, **OPTIONS)
    twice[0].info = {"layer": 3}
    with pytest.raises(ValueError, match="sample s0: info holds 'layer', a column of the results"):
        layer_sweep(build(), twice[:1], PAIRS, **OPTIONS)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"my notes\nand more\n", "line 1 is not a record"), (b"\xff\n", "notes.jsonl holds no records")],
)
def test_another_file_is_not_overwritten(tmp_path, content, message):
    path = tmp_path / "notes.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        layer_sweep(build(), samples(), PAIRS, output=path, **OPTIONS)
    assert path.read_bytes() == content


_WORKER = """
import sys
import torch
from tests.knockout.test_records import OPTIONS, PAIRS, build, samples
from peft_ext.knockout import layer_sweep
from peft_ext.knockout.sweep.processes import this_process
records = layer_sweep(build(), samples(), PAIRS, output=sys.argv[1], **OPTIONS)
assert this_process().num_processes == 2
assert len(records) == 18, len(records)
torch.distributed.destroy_process_group()
"""


def test_two_processes_share_the_samples(tmp_path):
    path, worker = tmp_path / "sweeps" / "sweep.jsonl", tmp_path / "worker.py"
    worker.write_text(_WORKER)
    launch(worker, tmp_path / "logs", 2, path, environment={"ACCELERATE_USE_CPU": "true"})
    assert os.listdir(path.parent) == ["sweep.jsonl"]
    alone = layer_sweep(build(), samples(), PAIRS, **OPTIONS)
    assert ordered(read_records(path)) == ordered(alone)
