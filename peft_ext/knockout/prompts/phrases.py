"""Give each phrase of a prompt its place: no two groups the same tokens, and a word in a longer option not its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from .spans import Match, Segment, compared


# Parts of the question; other names are looked for in all of the text.
IN_QUESTION = ("options", "true_option", "false_option", "objects")
_OPPOSITE = {"true_option": "false_option", "false_option": "true_option"}


class _Claim(NamedTuple):
    """The tokens that a part of the question has taken, and those where it could have been."""

    name: str
    phrase: str
    taken: set[int]
    possible: set[int]


def locate(text: Sequence[Segment], spans: Mapping[str, Any], row: int, occurrence: str) -> dict[str, list[int]]:
    """
    The tokens of each group of phrases.

    A phrase takes its best match, and of equal ones the first. Parts of the question are placed longest first, and a
    shorter one avoids what the longer ones match or have taken: of "Is it light blue or blue?" the option `blue` is
    the second one. Where there is no other place, objects may share tokens; the two options may not.

    Args:
        text (`Sequence[Segment]`): of the row, in the order in which equal matches are preferred.
        spans (`dict[str, str | list[str]]`): phrases by the name of their group.
        row (`int`): its number, for errors.
        occurrence (`str`): `"first"`, or `"all"` matches that are as good as the best.

    Raises:
        `ValueError`: naming the group, the phrase and the text, if a phrase is malformed or not there, or if two
            groups come out as the same tokens.
    """
    phrases = {name: _phrases(given, f"spans[{name!r}]") for name, given in spans.items()}
    found: dict[str, list[int]] = {name: [] for name in spans}
    claims: list[_Claim] = []

    def place(name: str, phrase: str, within: set[int] | None = None) -> None:
        matches = [match for segment in text for match in segment.find(phrase, within)]
        free = _free(matches, phrase, claims) if name in IN_QUESTION else matches
        rivals = [claim for claim in claims if claim.name == _OPPOSITE.get(name)]
        free = free or _free(matches, phrase, rivals)
        if not free:
            where = "the question" if within is not None else "the prompt"
            raise ValueError(f"spans[{name!r}]: {_missing(phrase, text, where, row, matches, rivals)}")
        best = min(match.rank for match in free)
        chosen = [match.tokens for match in free if match.rank == best]
        tokens = [token for hit in (chosen if occurrence == "all" else chosen[:1]) for token in hit]
        found[name] += tokens
        if name in IN_QUESTION:
            possible = {token for match in matches if match.whole for token in match.tokens}
            claims.append(_Claim(name, phrase, set(tokens), possible))

    for name in sorted(spans, key=lambda name: name != "question"):
        for phrase in phrases[name] if name not in IN_QUESTION else ():
            place(name, phrase)
    question = set(found["question"]) if "question" in spans else None
    parts = [(name, phrase) for name in spans if name in IN_QUESTION for phrase in phrases[name]]
    for name, phrase in sorted(parts, key=lambda part: -len(compared(part[1]))):
        place(name, phrase, question)
    for one, other in combinations(spans, 2):
        same = {compared(phrase) for phrase in phrases[one]} == {compared(phrase) for phrase in phrases[other]}
        if set(found[one]) == set(found[other]) and not same:
            raise ValueError(
                f"spans[{one!r}] ({', '.join(map(quoted, phrases[one]))}) and spans[{other!r}] "
                f"({', '.join(map(quoted, phrases[other]))}) come out as the same tokens in row {row}: write them as "
                f"they are in the text, or leave one out; the text is {shown(text)}."
            )
    return found


def _phrases(given: Any, name: str) -> list[str]:
    phrases = [given] if isinstance(given, str) else given
    if not isinstance(phrases, Sequence) or not phrases or not all(isinstance(phrase, str) for phrase in phrases):
        raise ValueError(f"{name} must be a phrase or a list of phrases, but is {given!r}.")
    for phrase in phrases:
        if not phrase.strip():
            raise ValueError(f"{name} holds the empty phrase {phrase!r}: leave it out.")
    return list(phrases)


def _free(matches: Iterable[Match], phrase: str, claims: Iterable[_Claim]) -> list[Match]:
    """The matches on tokens that no claim has taken, nor a longer phrase's could have."""
    closed: set[int] = set()
    for claim in claims:
        closed |= claim.taken
        if len(compared(claim.phrase)) > len(compared(phrase)):
            closed |= claim.possible
    return [match for match in matches if not closed & set(match.tokens)]


def _missing(
    phrase: str, text: Sequence[Segment], where: str, row: int, matches: list[Match], rivals: list[_Claim]
) -> str:
    if matches:
        rival = rivals[0]
        return (
            f"{quoted(phrase)} has no tokens of its own in {where} of row {row} beside spans[{rival.name!r}] "
            f"({quoted(rival.phrase)}): one holds the other, or one token holds both; the text is {shown(text)}."
        )
    return f"{quoted(phrase)} is not in {where} of row {row} as whole words; the text is {shown(text)}."


def shown(text: Sequence[Segment]) -> str:
    """A prompt's text for an error."""
    return quoted(" … ".join(segment.text for segment in text)[:300])


def quoted(text: str) -> str:
    """Text for an error; with escapes where characters may look alike or be invisible."""
    return repr(text) if text.isascii() else f"{text!r} ({text!a})"
