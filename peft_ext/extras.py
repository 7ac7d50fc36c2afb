"""Packages that an extra brings: what to install where one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtra(ImportError):
    """A package that only an extra brings is not installed."""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """
    Name the extra of this package, such as `plot`, where an import inside fails. Raises [`MissingExtra`], with the
    command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"this needs {error.name}, which is not installed: pip install 'peft-ext[{extra}]'", name=error.name
        ) from error
