"""Lets tests import the parts of `examples/quickstart.py` as the script does, and run it as users do."""

import json
import sys
from pathlib import Path

import pytest

from tests._processes import run


EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture
def run_script(tmp_path):
    """Function: name of a script and its arguments to what it prints and the content of the JSON that it writes."""

    def run_with(name, *arguments):
        out = tmp_path / "out"
        done = run(EXAMPLES / f"{name}.py", "--out", out, *arguments, output=tmp_path / "printed")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, json.loads((out / f"{name}.json").read_text())

    return run_with
