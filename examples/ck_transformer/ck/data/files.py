"""Files that others made: read whole, and errors that say where."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class DataFileError(ValueError):
    """A file is not laid out as its loader expects."""

    def __init__(self, path: Path, place: str, problem: str) -> None:
        super().__init__(f"{path}, {place}: {problem}")


class JsonFile:
    """
    A JSON file that knows the line of each of its parts.

    Args:
        path (`str` or `Path`): the file.
        kinds (`type`): what the file may hold: `dict`, `list`.
    """

    def __init__(self, path: str | Path, *kinds: type) -> None:
        self.path = Path(path)
        self.text = self.path.read_text(encoding="utf-8")
        try:
            self.content: Any = json.loads(self.text)
        except json.JSONDecodeError as error:
            raise DataFileError(self.path, f"line {error.lineno}", f"no valid JSON ({error.msg})") from None
        if not isinstance(self.content, kinds):
            needed = " or ".join(kind.__name__ for kind in kinds)
            raise self.error(f"holds a {type(self.content).__name__}, but a {needed} is needed")

    def error(self, problem: str, *keys: str | int) -> DataFileError:
        """An error about what lies under `keys`, with its line."""
        return DataFileError(self.path, f"line {locate(self.text, keys)}", problem)

    @contextmanager
    def expecting(self, what: str, *keys: str | int) -> Iterator[None]:
        """An error about what lies under `keys` if values cannot be taken or converted within."""
        try:
            yield
        except DataFileError:
            raise
        except (KeyError, IndexError, TypeError, ValueError):
            raise self.error(f"not the {what} that is expected", *keys) from None

    def get(self, *keys: str | int) -> Any:
        """What lies under `keys`; where something is missing, an error with the line of what is there."""
        content = self.content
        for depth, key in enumerate(keys):
            try:
                content = content[key]
            except (KeyError, IndexError, TypeError):
                raise self.error(f"no entry {key!r}", *keys[:depth]) from None
        return content


_BETWEEN = re.compile(r"[\s,:]*")


def locate(text: str, keys: tuple[str | int, ...]) -> int:
    """The line, from 1, on which the part of a JSON text under `keys` begins."""
    decoder = json.JSONDecoder()

    def skip(position: int) -> int:
        return _BETWEEN.match(text, position).end()  # type: ignore[union-attr]

    position = skip(0)
    for wanted in keys:
        is_object = text[position] == "{"
        number, position = 0, skip(position + 1)
        while True:
            key: Any = number
            if is_object:
                key, position = decoder.raw_decode(text, position)
                position = skip(position)
            if key == wanted:
                break
            position = skip(decoder.raw_decode(text, position)[1])
            number += 1
    return text.count("\n", 0, position) + 1
