"""Glosses of nouns, from the files of WordNet 3.x (their layout: the manual page wndb)."""

from __future__ import annotations

import re
from pathlib import Path

from ..data.files import DataFileError


_PARTS = re.compile(r';\s*(?=(?:[^"]*"[^"]*")*[^"]*$)')  # semicolons outside of quotation marks
HYPERNYMS = ("@", "@i")


class Nouns:
    """
    Args:
        folder (`str` or `Path`): holds `index.noun` and `data.noun`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.index_path, self.data_path = Path(folder) / "index.noun", Path(folder) / "data.noun"
        self.data = self.data_path.read_bytes()
        self.offsets: dict[str, list[int]] = {}
        for number, line in enumerate(self.index_path.read_text(encoding="utf-8").splitlines(), 1):
            if line.startswith("  ") or not line.strip():  # the licence
                continue
            fields = line.split()
            try:
                count = int(fields[2])
                self.offsets[fields[0]] = [int(offset) for offset in fields[-count:]]
            except (IndexError, ValueError):
                raise DataFileError(self.index_path, f"line {number}", "no entry of a WordNet index") from None

    def synset(self, offset: int) -> tuple[str, list[int], list[str]]:
        """First word of a synset, offsets of its hypernyms, and the parts of its definition."""
        end = self.data.find(b"\n", offset)
        line = self.data[offset : end if end >= 0 else None].decode("utf-8", errors="replace")
        try:
            if not line.startswith(f"{offset:08d} "):
                raise ValueError
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            rest = fields[4 + 2 * int(fields[3], 16) :]  # after the words: a count, and four fields per pointer
            pointers = [rest[1 + 4 * number : 5 + 4 * number] for number in range(int(rest[0]))]
            above = [int(pointer[1]) for pointer in pointers if pointer[0] in HYPERNYMS]
        except (IndexError, ValueError):
            number = self.data.count(b"\n", 0, offset) + 1
            raise DataFileError(self.data_path, f"line {number}", f"no synset of offset {offset:08d}") from None
        parts = [part for part in _PARTS.split(gloss.strip()) if part and not part.startswith('"')]
        return fields[4].replace("_", " "), above, parts

    def describe(self, name: str, hypernyms: int, sense: int | None = None) -> list[str]:
        """Facts about one or all senses of a noun, the most frequent first, and then about what they are kinds of."""
        level = self.offsets.get(name.replace(" ", "_"), [])
        if sense is not None:
            level = level[sense - 1 : sense]
        facts = [f"{name} is {part}" for offset in level for part in self.synset(offset)[2]]
        for _ in range(hypernyms):
            above = dict.fromkeys(offset for own in level for offset in self.synset(own)[1])
            for offset in above:
                word, _, parts = self.synset(offset)
                facts += [f"{name} is a kind of {word}, {part}" for part in parts]
            level = list(above)
        return facts
