"""Where phrases lie, by trying every stretch of a text: an independent reference for the search."""

import itertools
import re
import unicodedata


def squeezed(text):
    return "".join(text.split())


# What counts as one spelling, strictest first: Python's composed forms of whole strings.
FORMS = (
    lambda text: unicodedata.normalize("NFC", squeezed(text)),
    lambda text: unicodedata.normalize("NFC", squeezed(text).casefold()),
    lambda text: unicodedata.normalize("NFKC", squeezed(text).replace("\u00ad", "")).casefold(),
)
_UNSPACED = "猫犬"


def matches(text, phrase):
    """`(rank, start, end)` of each stretch of the text that is the phrase, or its plural, as whole words."""
    wanted = {}  # the phrase last, so that it counts before a plural
    for plural in ("es", "ES", "s", "S", ""):
        wanted |= {(rank, form(phrase + plural)): rank + 3 * bool(plural) for rank, form in enumerate(FORMS)}
    edges = [at for at in range(len(text) + 1) if _edge(text, at)]
    found = []
    for start, end in itertools.combinations(edges, 2):
        own = text[start:end]
        ranks = [wanted[key] for key in ((rank, form(own)) for rank, form in enumerate(FORMS)) if key in wanted]
        if own == own.strip() and ranks:
            found.append((min(ranks), start, end))
    return found


def _edge(text, at):
    """Whether a word may begin or end here."""
    before, after = re.search(r"\S*$", text[:at])[0], re.match(r"\S*", text[at:])[0]
    if not before or not after:
        return True
    if unicodedata.category(after[0]) in ("Mn", "Cf"):
        return False
    last = unicodedata.normalize("NFC", before.replace("\u00ad", ""))[-1:]
    return not all(character.isalnum() and character not in _UNSPACED for character in (last, after[0]))
