"""Collects results, and writes the table once every architecture has been tried."""

import re

from ._architectures import ARCHITECTURES
from ._table import COLUMN, write


_results = {}


def pytest_runtest_logreport(report):
    found = re.search(r"test_default_targets_learn_and_merge\[(.+)-(NeuroAda|PSN)\]", report.nodeid)
    properties = dict(report.user_properties).get(COLUMN)
    if report.when == "call" and found and properties:
        reason = "" if report.passed else report.longrepr.reprcrash.message.splitlines()[0][:120]
        _results[found[1], found[2]] = (reason, properties["left out"])


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput") and len(_results) == 2 * len(ARCHITECTURES):
        write(_results)
