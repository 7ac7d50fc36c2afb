"""A sample of the tests that need a GPU."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from .record import Record, Row


ROOT = Path(__file__).parents[3]
SAMPLE = "captured or equal_bits or (in_place and tuned) or (rounded_once and contiguous and tuned)"
TINY = "captured"
PATIENCE = 5  # seconds for the report of a sample that is ended


def command(tiny: bool) -> list[str]:
    """Pytest over the files that have such tests; in several processes, since most of their time goes to compiling."""
    files = [str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    options = ["-m", "gpu", "-k", TINY if tiny else SAMPLE, "-v", "-p", "no:cacheprovider", "--tb=line"]
    if importlib.util.find_spec("xdist") and not tiny:
        options += ["-n", str(min(12, os.cpu_count() or 1))]
    return [sys.executable, "-m", "pytest", *options, *files]


def run_tests(seconds: float, tiny: bool) -> Row:
    """How many passed and which failed; a sample that takes too long is ended and says how far it came."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "output").open("w+") as output:
        environ = os.environ | {"OMP_NUM_THREADS": "1", "HYPOTHESIS_STORAGE_DIRECTORY": folder}
        with subprocess.Popen(command(tiny), cwd=ROOT, env=environ, stdout=output, stderr=output) as process:
            ended = "ended"
            try:
                process.wait(max(1, seconds - PATIENCE))
            except subprocess.TimeoutExpired:
                ended = f"stopped after {seconds - PATIENCE:.0f} s"
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()
        output.seek(0)
        lines = output.read().splitlines()
    outcomes = Counter(found[1] for line in lines if (found := re.search(r" (PASSED|FAILED|ERROR|SKIPPED)\b", line)))
    failed = [
        line for line in lines if line.startswith(("FAILED", "ERROR")) or re.match(r"(/|E ).*(Error|assert)", line)
    ]
    return {"ended": ended, "outcomes": dict(outcomes), "failed": failed[:50], "tail": "\n".join(lines)[-3000:]}


def run(record: Record, args: argparse.Namespace) -> None:
    record.attempt({"sample": TINY if args.tiny else SAMPLE}, lambda: run_tests(record.seconds_left, args.tiny))
