"""Results of a sweep, one JSON object per line, that an interrupted sweep continues."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from glob import escape, glob
from pathlib import Path
from typing import Any

from ..files import write_atomically


Record = dict[str, Any]
SETTINGS = ("window", "mode", "answer_token")


class RecordFile:
    """
    The file, or with several processes one file of each, joined at the end.

    Args:
        path (`str` or `os.PathLike`): of the results, `*.jsonl`.
        settings (`dict`): the columns that say how the sweep was made.
        per_sample (`int`): records that a complete row of a sample has.
        process (`int`), processes (`int`): which of how many processes this is.

    Raises:
        `ValueError`: if the file is of a sweep with other settings, or not of a sweep at all.
    """

    def __init__(
        self, path: str | os.PathLike[str], settings: Mapping[str, Any], per_sample: int, process: int, processes: int
    ) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        own = self.path if processes == 1 else _part(self.path, process)
        self.kept: list[Record] = []
        for file in _files(self.path):
            records = _complete(_read(file), settings, per_sample, file)
            self.kept += records
            if file == own:
                _write(own, records)  # without a line or a sample that was cut off
        self.done = {str(record["sample"]) for record in self.kept}
        self._file = open(own, "a", encoding="utf-8")  # noqa: SIM115

    def add(self, records: Sequence[Record]) -> None:
        """Write one sample's records."""
        self._file.write("".join(json.dumps(record) + "\n" for record in records))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def join(self) -> None:
        """Put all processes' results into the one file. To be called by one process, after all have finished."""
        files = _files(self.path)
        if files == [self.path]:
            return
        records = [record for file in files for record in _read(file)]
        _write(self.path, records)
        for file in files:
            if file != self.path:
                os.remove(file)


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """
    A sweep's results, of a line that was cut off all but that line. Ready for `pandas.DataFrame(records)`.

    Raises:
        `ValueError`: naming the line, if the file holds something else.
    """
    return _read(Path(path))


def _part(path: Path, process: int) -> Path:
    return path.with_name(f"{path.stem}.process{process}{path.suffix}")


def _files(path: Path) -> list[Path]:
    parts = glob(escape(str(path.with_suffix(""))) + ".process*" + path.suffix)
    return ([path] if path.exists() else []) + [Path(part) for part in sorted(parts)]


def _read(file: Path) -> list[Record]:
    records = []
    lines = file.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "sample" not in record:
                raise ValueError("not a record")
        except ValueError as error:
            if number == len(lines):  # without its line end: the writer was interrupted
                break
            raise ValueError(
                f"{file}: line {number} is not a record of a sweep ({error}); move the file away."
            ) from None
        records.append(record)
    return records


def _complete(records: list[Record], settings: Mapping[str, Any], per_sample: int, file: Path) -> list[Record]:
    for record in records:
        other = {name: record.get(name) for name in SETTINGS if record.get(name) != settings[name]}
        if other:
            raise ValueError(
                f"{file} holds a sweep with other settings ({other} instead of "
                f"{ {name: settings[name] for name in other} }); give another output, or move the file away."
            )
    counts = Counter(record["sample"] for record in records)
    too_many = [name for name, count in counts.items() if count > per_sample]
    if too_many:
        raise ValueError(
            f"{file} holds {counts[too_many[0]]} records of sample {too_many[0]!r} where this sweep has {per_sample}: "
            "it is of other pairs or layers; give another output, or move the file away."
        )
    return [record for record in records if counts[record["sample"]] == per_sample]


def _write(path: Path, records: Iterable[Record]) -> None:
    write_atomically(str(path), "".join(json.dumps(record) + "\n" for record in records))
