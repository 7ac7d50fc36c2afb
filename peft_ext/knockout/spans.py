"""Find phrases in a tokenised prompt: which tokens they lie in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


OCCURRENCES = ("first", "all")
_INCOMPLETE = "\ufffd"  # what some bytes of a character decode to


@dataclass
class Segment:
    """
    A run of text tokens without image tokens between them.

    Attributes:
        text (`str`): decoded.
        owners (`list[list[int]]`): for each character, the positions in the sequence of the tokens that it lies in:
            more than one where tokens hold parts of its bytes.
    """

    text: str
    owners: list[list[int]]

    def __post_init__(self) -> None:
        # Tokenizers differ in the spaces that they decode to, so phrases are compared without any.
        kept = [at for at, character in enumerate(self.text) if not character.isspace()]
        self._characters = "".join(self.text[at] for at in kept)
        self._lower = _lower(self._characters)
        self._kept = kept
        self._glued = [at > 0 and not self.text[at - 1].isspace() for at in kept]

    def find(self, phrase: str, within: set[int] | None = None) -> list[list[int]]:
        """
        Positions of the tokens of each occurrence, in order. Occurrences are whole words; where there is none, words
        that are up to two letters longer, as plurals are. Case counts only if it helps.

        Args:
            phrase (`str`): what to look for.
            within (`set[int]`, *optional*): positions that an occurrence must lie in.
        """
        wanted = "".join(phrase.split())
        found = []
        for text, sought in ((self._characters, wanted), (self._lower, _lower(wanted))):
            for longer in (0, 1, 2):
                found = [
                    tokens
                    for start in _starts(text, sought)
                    if self._bounded(start, end := start + len(sought) + longer)
                    and text[start + len(sought) : end].isalpha() == bool(longer)
                    and (tokens := self._tokens(start, end))
                    and (within is None or set(tokens) <= within)
                ]
                if found:
                    return found
        return found

    def _bounded(self, start: int, end: int) -> bool:
        return end <= len(self._characters) and self._boundary(start) and self._boundary(end)

    def _boundary(self, at: int) -> bool:
        """Whether a word may begin or end between two characters."""
        if at in (0, len(self._characters)) or not self._glued[at]:
            return True
        return not (_in_word(self._characters[at - 1]) and _in_word(self._characters[at]))

    def _tokens(self, start: int, end: int) -> list[int]:
        return sorted({token for at in self._kept[start:end] for token in self.owners[at]})


def _starts(text: str, phrase: str) -> list[int]:
    return [at for at in range(len(text) - len(phrase) + 1) if text.startswith(phrase, at)] if phrase else []


def _lower(text: str) -> str:
    """In lower case, character by character."""
    return "".join(lower if len(lower := character.lower()) == 1 else character for character in text)


def _in_word(character: str) -> bool:
    # Of Chinese and Japanese each character counts as a word, since nothing separates them.
    return (character.isalnum() or character == "_") and ord(character) < 0x2E80


def segments(tokenizer: Any, tokens: Sequence[int], kept: Sequence[bool]) -> list[Segment]:
    """
    The text of a row.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): that made the tokens.
        tokens (`Sequence[int]`): the row of input_ids.
        kept (`Sequence[bool]`): which of them are text, neither image nor padding.
    """
    found, run = [], list[int]()
    for at in range(len(tokens) + 1):
        if at < len(tokens) and kept[at]:
            run.append(at)
        elif run:
            found.append(_segment(tokenizer, tokens, run))
            run = []
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
