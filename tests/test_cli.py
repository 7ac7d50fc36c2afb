"""The command `peft-ext` answers at once what needs no model: help, version, wrong commands."""

import argparse
import importlib
import json
import re
import shlex
import subprocess
import sys

import pytest

from peft_ext.cli import JOBS
from peft_ext.commands import flow
from peft_ext.knockout.cli import _DTYPES
from peft_ext.knockout.sweep.engines import ENGINES
from peft_ext.knockout.sweep.windows import MODES


SCRIPT = """
import json, sys, time
from peft_ext.cli import main
try:
    status = main()
except SystemExit as exit:
    status = exit.code
heavy = [name for name in ("torch", "peft", "transformers", "numpy") if name in sys.modules]
print(json.dumps({"status": status, "heavy": heavy, "seconds": time.process_time()}))
"""


def run(folder, *arguments):
    """Run the command as a console script; what it printed, and how it ended."""
    script = folder / "peft-ext"
    script.write_text(SCRIPT)
    result = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=300)
    *printed, last = result.stdout.splitlines()
    return "\n".join(printed) + result.stderr, json.loads(last)


@pytest.mark.parametrize(
    ("arguments", "status", "printed"),
    [
        (["--help"], 0, "where information flows"),
        (["--version"], 0, "peft-ext "),
        ([], 2, "required: COMMAND"),
        (["convrt"], 2, "invalid choice: 'convrt'"),
        (["--verbose", "convert"], 2, "unrecognized arguments|invalid choice|required"),
        *(([job, "--help"], 0, rf"usage: peft-ext {job} ") for job in JOBS),
        (["flow"], 2, "required: --model"),
        (["flow", "--model", "m", "--data", "d", "--out", "o", "--mode", "x"], 2, "--mode: invalid choice: 'x'"),
        (["merge", "base"], 2, "required: adapter, out"),
        (["export", "a", "b", "--to", "nothing"], 2, "--to: invalid choice: 'nothing'"),
        (["convert", "a"], 2, "required: out"),
        (["inspect"], 2, "required: adapter"),
        (["inspect", "a", "--rank", "4"], 2, "unrecognized arguments: --rank 4"),
        (["train"], 2, "required: --config"),
        (["llava"], 2, "required: STEP"),
        (
            ["llava", "train", "tune", "--method", "lore-8"],
            2,
            "--method: method='lore-8' is not known: use full",
        ),
        (["llava", "methods", "--model", "m", "--methods", "adapter"], 2, "no bottleneck adapters"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_answers_without_importing_torch(tmp_path, arguments, status, printed):
    text, end = run(tmp_path, *arguments)
    assert re.search(printed, text), text
    assert end["status"] == status and not end["heavy"]
    assert end["seconds"] < 0.3  # CPU time, the interpreter's start included


def test_options_know_the_names_that_the_work_knows():
    parser = argparse.ArgumentParser()
    flow.add_arguments(parser)
    choices = {action.dest: action.choices for action in parser._actions}
    assert choices["mode"] == MODES and choices["engine"] == ("auto", *ENGINES)
    assert choices["dtype"] == tuple(_DTYPES)


@pytest.mark.parametrize("name", JOBS)
def test_examples_of_the_help_are_commands(name):
    job = importlib.import_module(f"peft_ext.commands.{name}")
    parser = argparse.ArgumentParser()
    job.add_arguments(parser)
    examples = [line for line in job.EXAMPLE.splitlines() if line.startswith(f"  peft-ext {name} ")]
    assert examples
    for line in examples:
        _, further = parser.parse_known_args(shlex.split(line, comments=True)[2:])
        assert not further or hasattr(job, "TAKES_FURTHER_OPTIONS")


def test_job_has_our_methods(tmp_path):
    """A folder that is none: the job itself says so, with everything imported."""
    text, end = run(tmp_path, "convert", str(tmp_path / "none"), str(tmp_path / "out"))
    assert end["status"] == 1 and "peft-ext convert: " in text and "torch" in end["heavy"]


def test_public_names_are_there_in_the_command_too(tmp_path):
    (tmp_path / "peft-ext").write_text(
        "import sys, peft_ext\n"
        "assert 'torch' not in sys.modules\n"
        "from peft_ext import NeuroAdaConfig\n"
        "from peft import PeftType\n"
        "print(PeftType('NEUROADA') == NeuroAdaConfig().peft_type, hasattr(peft_ext, 'nothing'))\n"
    )
    result = subprocess.run([sys.executable, str(tmp_path / "peft-ext")], capture_output=True, text=True, timeout=300)
    assert result.stdout.split() == ["True", "False"], result.stderr
