"""Lets tests import the parts of `examples/quickstart.py` as the script does, and run it as users do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture
def run_quickstart():
    """Function: output folder and arguments to what the script prints and the content of its JSON."""

    def run(out, *arguments):
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "quickstart.py"), "--out", str(out), *arguments],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, json.loads((out / "quickstart.json").read_text())

    return run
