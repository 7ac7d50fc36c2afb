"""Sums a run up, and keeps `NOT_APPLICABLE.md`: every test of PEFT that did not run, with the reason."""

import json
import re
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .recorder import UNTOUCHED
from .scope import MODULES, REMARKS, RULES, rule_for


PAGE = Path(__file__).with_name("NOT_APPLICABLE.md")

_HEAD = """\
# Tests of PEFT {release} that do not apply

Written by `python tests/upstream/run.py --update`. A run of `make test-peft` fails when a test is left out or skips
itself for a reason that is not on this page. Figures count tests, with all their parameters.
"""


def summarise(method: str, outcome: Path) -> tuple[dict[str, Any], int]:
    """
    Prints what became of the tests of one run.

    Returns:
        `tuple[dict, int]`: the run's notes, and an exit status that is 0 when all that ran passed.
    """
    if not outcome.exists():
        print(f"\n{method}: pytest ended before it could report; its output above says why.")
        return {}, 1
    run = json.loads(outcome.read_text())
    by_outcome: dict[str, list[str]] = defaultdict(list)
    for test, (result, _) in run["outcomes"].items():
        by_outcome[result].append(test)
    left_out = sum(len(tests) for tests in run["left_out"].values())
    print(f"\nPEFT {version('peft')}'s tests on {method}:")
    print(f"  {len(by_outcome['passed'])} passed, {len(by_outcome['failed'])} failed,", end=" ")
    print(f"{len(by_outcome['skipped'])} skipped themselves, {left_out} left out ({PAGE.name} has the reasons)")
    for test in by_outcome["failed"]:
        print(f"  FAILED {test.removeprefix('tests/')}: {' '.join(run['outcomes'][test][1].split())[:200]}")
    return run, int(bool(by_outcome["failed"]) or not by_outcome["passed"])


def report_stale_rules(runs: dict[str, dict[str, Any]]) -> int:
    """Says which rules leave out no test of any method."""
    left_out = [item for run in runs.values() for item in run["left_out"].items()]
    used = {rule_for(module, test) for module, tests in left_out for test in tests}
    stale = [rule for rule in RULES if rule not in used]
    for rule in stale:
        print(f"  STALE rule in scope.py, it leaves out no test: {rule}")
    return int(bool(stale))


def check_page(runs: dict[str, dict[str, Any]]) -> int:
    """Compares the page with what happened."""
    text = PAGE.read_text() if PAGE.exists() else ""
    if f"PEFT {version('peft')} " not in text:
        print(f"{PAGE.name} describes another release of PEFT: not compared.")
        return 0
    unlisted = sorted({line for run in runs.values() for line in _keys(run) if line not in text})
    for line in unlisted:
        print(f"  UNLISTED in {PAGE.name}: {line}")
    if unlisted:
        print(f"Run with --update, and check that the new lines of {PAGE.name} are right.")
    return int(bool(unlisted))


def write_page(runs: dict[str, dict[str, Any]]) -> None:
    sections = [_HEAD.format(release=version("peft")), "## Modules that do not run\n"]
    sections += [f"- `test_{module}.py`: {reason}" for module, reason in sorted(MODULES.items())]
    for method, run in runs.items():
        sections += ["", f"# {method}", *_describe(run)]
    PAGE.write_text("\n".join(sections) + "\n")


def _describe(run: dict[str, Any]) -> list[str]:
    lines = ["", "## Tests left out by `scope.py`"]
    for module, reasons in sorted(_grouped_left_out(run).items()):
        lines += ["", f"### test_{module}.py", ""]
        lines += [f"- {reason} ({sum(tests.values())}): {_listed(tests)}" for reason, tests in sorted(reasons.items())]
    lines += ["", "## Rows of PEFT's matrices that make no case", ""]
    for module, rows in sorted(run["rows"].items()):
        by_reason: dict[str, list[str]] = defaultdict(list)
        for row, reason in sorted(rows.items()):
            by_reason[reason].append(row)
        lines += [f"- `test_{module}.py`, {reason}: {', '.join(by_reason[reason])}" for reason in sorted(by_reason)]
    skipped = _grouped_skips(run)
    lines += ["", "## Tests that skip themselves", ""]
    for reason, tests in sorted(skipped.items()):
        if reason != UNTOUCHED:
            remark = f" [{REMARKS[reason]}]" if reason in REMARKS else ""
            lines.append(f"- {reason}{remark} ({sum(tests.values())}): {_listed(tests)}")
    lines += ["", f"## Tests that say nothing about the method: each {UNTOUCHED.partition(':')[0]}", ""]
    lines += [f"- {_listed({test: count})}" for test, count in sorted(skipped.get(UNTOUCHED, {}).items())]
    return lines


def _grouped_left_out(run: dict[str, Any]) -> dict[str, dict[str, dict[str, int]]]:
    groups: dict[str, dict[str, dict[str, int]]] = {}
    for module, tests in run["left_out"].items():
        for test, reason in tests.items():
            counts = groups.setdefault(module, {}).setdefault(reason, {})
            counts[_function(test)] = counts.get(_function(test), 0) + 1
    return groups


def _grouped_skips(run: dict[str, Any]) -> dict[str, dict[str, int]]:
    groups: dict[str, dict[str, int]] = {}
    for nodeid, (result, reason) in run["outcomes"].items():
        if result == "skipped":
            name = _function(nodeid.removeprefix("tests/"))
            counts = groups.setdefault(_plain(reason), {})
            counts[name] = counts.get(name, 0) + 1
    return groups


def _keys(run: dict[str, Any]) -> list[str]:
    """What the page must say: the reasons, and the names of the tests that were not the method's."""
    skipped = _grouped_skips(run)
    keys = [reason for tests in run["left_out"].values() for reason in tests.values()]
    keys += [reason for rows in run["rows"].values() for reason in rows.values()]
    keys += [reason for reason in skipped if reason != UNTOUCHED]
    return keys + [f"`{test}`" for test in skipped.get(UNTOUCHED, {})]


def _listed(tests: dict[str, int]) -> str:
    return ", ".join(f"`{test}`" for test in sorted(tests))


def _function(test: str) -> str:
    """A test's class and function, without parameters."""
    return test.partition("[")[0]


def _plain(reason: str) -> str:
    """A reason without what differs between methods or machines."""
    reason = re.sub(r"<class '[\w.]*\.(\w+)'>", r"`\1`", " ".join(reason.split()))
    return re.sub(r" object at 0x[0-9a-f]+", "", reason)
