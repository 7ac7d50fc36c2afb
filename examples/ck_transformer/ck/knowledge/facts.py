"""The fact base: what is known of each category (appendix A.4)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.files import JsonFile
from . import wordnet


# KB-Ref keeps the facts of a category in one string, here and there without a blank between sentences.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[a-z]\.)(?=[A-Z])")


def category_key(category: str) -> str:
    """The name that facts are kept under: `Traffic_Light.n.01` and `traffic light` are one category."""
    return category.split(".")[0].replace("_", " ").strip().lower()


class FactBase:
    """
    Facts by category. They are looked up by category before any search, so no index over all of them is needed.

    Args:
        facts (`Mapping[str, Sequence[str]]`): of each category; repetitions are dropped.
    """

    def __init__(self, facts: Mapping[str, Sequence[str]]) -> None:
        self.facts: dict[str, list[str]] = {}
        for category, own in facts.items():
            known = self.facts.setdefault(category_key(category), [])
            known += [fact for fact in dict.fromkeys(own) if fact not in known]

    @classmethod
    def from_json(cls, *paths: str | Path) -> FactBase:
        """
        Read `{category: facts}`, with the facts as a list or, as KB-Ref's `Wikipedia.json`, `ConceptNet.json` and
        `WebChild.json` have them, as one text, which is cut into sentences.
        """
        merged = cls({})
        for path in paths:
            file = JsonFile(path, dict)
            merged = merged | cls({category: _sentences(file, category) for category in file.content})
        return merged

    @classmethod
    def from_wordnet(cls, folder: str | Path, categories: Iterable[str], hypernyms: int = 1) -> FactBase:
        """
        Take the glosses of the nouns that categories are called by.

        Args:
            folder (`str` or `Path`): holds WordNet's `index.noun` and `data.noun`.
            categories (`Iterable[str]`): to look up: `tree.n.01` in its first sense, `tree` in all of them.
            hypernyms (`int`, *optional*, defaults to 1): how many more general levels are described too.
        """
        nouns = wordnet.Nouns(folder)
        facts: dict[str, list[str]] = {}
        for category in dict.fromkeys(categories):
            sense = category.rpartition(".n.")[2] if ".n." in category else ""
            name = category_key(category)
            facts.setdefault(name, []).extend(nouns.describe(name, hypernyms, int(sense) if sense.isdigit() else None))
        return cls(facts)

    def of(self, category: str) -> list[str]:
        """Facts about a category; none if it is not known."""
        return self.facts.get(category_key(category), [])

    def restricted(self, categories: Iterable[str]) -> FactBase:
        """The part about these categories."""
        return FactBase({name: self.of(name) for name in map(category_key, categories)})

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")

    def __or__(self, other: FactBase) -> FactBase:
        names = dict.fromkeys((*self.facts, *other.facts))
        return FactBase({name: [*self.of(name), *other.of(name)] for name in names})

    def __len__(self) -> int:
        return sum(map(len, self.facts.values()))


def _sentences(file: JsonFile, category: str) -> list[str]:
    value: Any = file.content[category]
    if isinstance(value, str):
        value = _SENTENCE_END.split(value)
    if not isinstance(value, list) or not all(isinstance(fact, str) for fact in value):
        raise file.error(f"facts of {category!r} must be a text or a list of texts", category)
    return [fact.strip() for fact in value if fact.strip()]
