"""Find phrases in a tokenised prompt: which tokens they lie in."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple


OCCURRENCES = ("first", "all")
_INCOMPLETE = "\ufffd"  # what some bytes of a character decode to
_PLURALS = ("s", "es")
# Thai and Lao, Burmese, Khmer, Chinese and Japanese: nothing separates words. Korean: particles are written onto them.
_UNSPACED = (
    *(range(0x0E00, 0x0F00), range(0x1000, 0x10A0), range(0x1100, 0x1200), range(0x1780, 0x1800)),
    *(range(0x2E80, 0xA4D0), range(0xA960, 0xA980), range(0xAC00, 0xD800), range(0xF900, 0xFB00)),
    *(range(0xFF66, 0xFFDD), range(0x1AFF0, 0x1B170), range(0x20000, 0x40000)),
)
_JAMO = range(0x1160, 0x1200)  # vowels and final consonants, which continue a Korean syllable


class Match(NamedTuple):
    """One occurrence of a phrase."""

    rank: int  # how well it matches; 0 is best, see [`Segment.find`]
    tokens: list[int]  # positions in the sequence

    @property
    def whole(self) -> bool:
        """Whether it is the phrase itself, not its plural."""
        return self.rank < len(_FORMS)


@dataclass
class Segment:
    """A run of text tokens without image tokens between them."""

    text: str  # decoded
    # For each character, the positions in the sequence of the tokens that it lies in: more than one where tokens hold
    # parts of its bytes
    owners: list[list[int]]

    def __post_init__(self) -> None:
        self._folded = [_fold(self.text, form) for form in _FORMS]

    def find(self, phrase: str, within: set[int] | None = None) -> list[Match]:
        """
        All occurrences of a phrase as whole words, in order, each with its best rank.

        Ranks 0 to 2 are the phrase itself: as it is written; in another case; in a compatible spelling (full-width
        letters, ligatures, without invisible characters). Ranks 3 to 5 are its plural in -s or -es, in the same order.
        Unicode's composed and decomposed forms (NFC and NFD) are one spelling.

        Args:
            phrase (`str`): what to look for.
            within (`set[int]`, *optional*): positions that an occurrence must lie in.
        """
        found: dict[tuple[int, int], Match] = {}
        for rank, (form, text) in enumerate(zip(_FORMS, self._folded, strict=True)):
            wanted = _fold(phrase, form).characters
            for start in _starts(text.characters, wanted):
                end = start + len(wanted)
                stop = text.boundary.index(True, end)
                plural = text.characters[end:stop].casefold()
                if not text.boundary[start] or (plural and plural not in _PLURALS):
                    continue
                place = min(text.origin[start:stop]), max(text.origin[start:stop])
                # all between them, with the invisible characters that a form leaves out
                visible = (at for at in range(place[0], place[1] + 1) if not self.text[at].isspace())
                tokens = sorted({token for at in visible for token in self.owners[at]})
                if tokens and (within is None or set(tokens) <= within):
                    found.setdefault(place, Match(rank + len(_FORMS) * bool(plural), tokens))
        return [found[place] for place in sorted(found)]


class _Folded(NamedTuple):
    """A text in a form for comparison, without spaces, since tokenizers differ in those that they decode to."""

    characters: str  # of that form
    origin: list[int]  # for each of them the character of the text that it comes from
    boundary: list[bool]  # whether a word may begin or end before each of them, and at the end


def _exact(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def _caseless(text: str) -> str:
    return _exact(_exact(text).casefold())


def _compatible(text: str) -> str:
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return "".join(character for character in text if not _invisible(character))


# The forms in which a phrase and a text are compared, strictest first.
_FORMS: tuple[Callable[[str], str], ...] = (_exact, _caseless, _compatible)


def _fold(text: str, form: Callable[[str], str]) -> _Folded:
    pieces = [(piece, at) for at, character in enumerate(text) for piece in form(character)]
    # Each character by itself tells where its pieces come from; accents are then put into Unicode's order.
    letters = list(accumulate(not unicodedata.combining(piece) for piece, _ in pieces))
    order = sorted(range(len(pieces)), key=lambda at: (letters[at], unicodedata.combining(pieces[at][0])))
    characters, origin, boundary = "", list[int](), list[bool]()
    space, letter = True, ""
    for piece, at in (pieces[number] for number in order):
        if piece.isspace():
            space = True
            continue
        apart = not _continues(piece) and [at] != origin[-1:] and not (_in_word(letter) and _in_word(piece))
        boundary.append(space or apart)
        if space or not _continues(piece):
            letter = piece
        characters += piece
        origin.append(at)
        space = False
    return _Folded(characters, origin, [*boundary, True])


def compared(phrase: str) -> str:
    """A phrase in the widest form in which it is compared, without case and spaces."""
    return _fold(phrase, _compatible).characters


def _starts(text: str, phrase: str) -> list[int]:
    return [at for at in range(len(text) - len(phrase) + 1) if text.startswith(phrase, at)] if phrase else []


def _invisible(character: str) -> bool:
    # A zero-width space separates words all the same.
    return unicodedata.category(character) == "Cf" and character != "\u200b"


def _continues(character: str) -> bool:
    """Whether a character belongs to the one before it, as accents and vowel signs do."""
    return unicodedata.category(character)[0] == "M" or _invisible(character) or ord(character) in _JAMO


def _in_word(character: str) -> bool:
    if not character or not (character.isalnum() or character == "_"):
        return False
    return not any(ord(character) in script for script in _UNSPACED)


def segments(tokenizer: Any, tokens: Sequence[int], kept: Sequence[bool]) -> list[Segment]:
    """The text of a row of `input_ids`; `kept` says which tokens are text, neither image nor padding."""
    return [_segment(tokenizer, tokens, run) for run in consecutive_runs([at for at, text in enumerate(kept) if text])]


def consecutive_runs(positions: Sequence[int]) -> list[list[int]]:
    """Sorted positions, in runs of neighbours."""
    found: list[list[int]] = []
    for at in positions:
        if found and at == found[-1][-1] + 1:
            found[-1].append(at)
        else:
            found.append([at])
    return found


def _segment(tokenizer: Any, tokens: Sequence[int], run: list[int]) -> Segment:
    # Decoded prefix by prefix: this needs no offsets, which not all tokenizers give and processors often drop.
    owners: list[list[int]] = []
    text = ""
    for count in range(1, len(run) + 1):
        longer = tokenizer.decode(
            [tokens[at] for at in run[:count]], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        shared = next(
            (at for at, (a, b) in enumerate(zip(text, longer, strict=False)) if a != b), min(len(text), len(longer))
        )
        # A token that completes a character replaces the mark that stood for its first bytes, and shares it.
        before = owners[shared:]
        owners = owners[:shared]
        for at in range(shared, len(longer)):
            earlier = before[at - shared] if at - shared < len(before) else []
            owners.append([*earlier, run[count - 1]])
        if shared == len(longer) and longer.endswith(_INCOMPLETE):
            owners[-1].append(run[count - 1])  # more bytes of a character, still not all
        text = longer
    return Segment(text, owners)
