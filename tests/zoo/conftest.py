"""Collects outcomes, and writes the page once everything has been tried and holds."""

from ._architectures import ARCHITECTURES
from ._page import CELL, write


_cells = {}


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        _cells.update({tuple(cell[:3]): cell[3] for name, cell in report.user_properties if name == CELL})


def pytest_sessionfinish(session):
    tried = {(table, row) for table, row, _ in _cells}
    complete = {("architectures", name) for name in ARCHITECTURES} <= tried and len({t for t, _ in tried}) == 4
    if not hasattr(session.config, "workerinput") and complete and not session.testsfailed:
        order = [*ARCHITECTURES, *_order()]
        cells = dict(sorted(_cells.items(), key=lambda cell: order.index(cell[0][1])))
        write(
            cells,
            [f"- {name}: `{found.idle}`, since {found.why}." for name, found in ARCHITECTURES.items() if found.why],
        )


def _order():
    """Rows of the other tables; with several processes tests end in any order."""
    from ._trainers import TRAINERS
    from .test_quantisations import QUANTISED
    from .test_verbs import VERBS

    return [*VERBS, *TRAINERS, *QUANTISED]
