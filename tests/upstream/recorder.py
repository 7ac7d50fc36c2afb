"""Writes down what became of each of PEFT's tests, also of those that did not run."""

import json
import os
from pathlib import Path
from typing import Any

import pytest


UNTOUCHED = "builds no config of the method: about another method, or about none"


class Recorder:
    """
    A pytest plugin that collects outcomes and reasons, and writes them as JSON at the end.

    With pytest-xdist the processes that run the tests know what they left out, and the one that leads them knows the
    outcomes; every process collects all tests, so the notes of any of them will do.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.notes: dict[str, Any] = {"rows": {}, "left_out": {}}
        self.outcomes: dict[str, list[str]] = {}

    def note_row(self, module: str, row: str, reason: str) -> None:
        self.notes["rows"].setdefault(module, {})[row] = reason

    def note_left_out(self, module: str, test: str, reason: str) -> None:
        self.notes["left_out"].setdefault(module, {})[test] = reason

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome, reason = report.outcome, ""
        if hasattr(report, "wasxfail"):
            outcome, reason = "skipped", f"PEFT expects it to fail: {report.wasxfail}"
        elif report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash is not None else str(report.longrepr)
        known = self.outcomes.get(report.nodeid)
        if report.when == "call" or outcome != "passed" or known is None:
            self.outcomes[report.nodeid] = [outcome, reason]

    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["notes"] = self.notes
            return
        target = os.environ.get("PEFT_EXT_UPSTREAM_REPORT")
        if target:
            Path(target).write_text(json.dumps({**self.notes, "outcomes": self.outcomes}, indent=1))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.notes = getattr(node, "workeroutput", {}).get("notes", self.notes)


def recorder_of(config: pytest.Config) -> Recorder:
    """The recorder of this session, registered on first use."""
    recorder = config.pluginmanager.get_plugin("peft-ext-recorder")
    if recorder is None:
        recorder = Recorder(config)
        config.pluginmanager.register(recorder, "peft-ext-recorder")
    return recorder
