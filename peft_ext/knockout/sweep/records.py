"""Results of a sweep, one JSON object per line, that an interrupted sweep continues."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from glob import escape, glob
from pathlib import Path
from typing import Any

from ...io import write_atomically


Record = dict[str, Any]
SETTINGS = ("window", "mode", "answer_token")


class RecordFile:
    """
    The file, or with several processes one file of each, joined at the end.

    Args:
        path (`str` or `os.PathLike`): of the results, `*.jsonl`.
        settings (`dict`): the columns that say how the sweep was made.
        expected (`Collection[tuple[str, int]]`): pair and layer of each record of a complete row of a sample.
        process (`int`), processes (`int`): which of how many processes this is.

    Raises:
        `ValueError`: if the file is of a sweep with other settings, or not of a sweep at all.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: Mapping[str, Any],
        expected: Collection[tuple[str, int]],
        process: int,
        processes: int,
    ) -> None:
        self.path, self._settings, self._expected = Path(path), settings, set(expected)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        own = self.path if processes == 1 else _part(self.path, process)
        self.kept: list[Record] = []
        for file in _files(self.path):
            records = self._complete(file)
            self.kept += records
            if file == own:
                write_records(own, records)  # without a line or a sample that was cut off
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
        records: list[Record] = []
        for file in files:
            before = {str(record["sample"]) for record in records}  # two processes may have had one sample
            records += [record for record in self._complete(file) if str(record["sample"]) not in before]
        write_records(self.path, records)
        for file in files:
            if file != self.path:
                os.remove(file)

    def _complete(self, file: Path) -> list[Record]:
        """A file's records, without the samples that were cut off."""
        records = _read(file)
        found: dict[str, set[tuple[str, int]]] = {}
        for record in records:
            other = {name: record.get(name) for name in SETTINGS if record.get(name) != self._settings[name]}
            if other:
                raise ValueError(
                    f"{file} holds a sweep with other settings ({other} instead of "
                    f"{ {name: self._settings[name] for name in other} }); give another output, or move the file away."
                )
            place = record.get("pair"), record.get("layer")
            if place not in self._expected:
                raise ValueError(
                    f"{file} holds {place[0]} at layer {place[1]}, which this sweep does not have: it is of other "
                    "pairs or layers; give another output, or move the file away."
                )
            own = found.setdefault(str(record["sample"]), set())
            if place in own:
                raise ValueError(
                    f"{file} holds {place[0]} at layer {place[1]} of sample {record['sample']!r} twice; give another "
                    "output, or move the file away."
                )
            own.add(place)
        partial = [name for name, places in found.items() if places != self._expected]
        if partial and partial != list(found)[-1:]:  # an interruption cuts off the last sample alone
            raise ValueError(
                f"{file} lacks pairs or layers of this sweep for sample {partial[0]!r}: it is of other pairs or "
                "layers; give another output, or move the file away."
            )
        return [record for record in records if str(record["sample"]) not in partial]


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """
    Read the results of a sweep. A last line that was cut off is ignored. Pass the records to
    `pandas.DataFrame(records)` for a table.

    Args:
        path (`str`):
            The file.

    Raises:
        `ValueError`: If the file holds something else; the message names the line.
    """
    return _read(Path(path))


def _part(path: Path, process: int) -> Path:
    return path.with_name(f"{path.stem}.process{process}{path.suffix}")


def _files(path: Path) -> list[Path]:
    parts = glob(escape(str(path.with_suffix(""))) + ".process*" + path.suffix)
    return ([path] if path.exists() else []) + [Path(part) for part in sorted(parts)]


def _read(file: Path) -> list[Record]:
    records = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} holds no records of a sweep ({error}); move the file away.") from None
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


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a file of records, all of it or nothing."""
    write_atomically(str(path), "".join(json.dumps(record) + "\n" for record in records))
