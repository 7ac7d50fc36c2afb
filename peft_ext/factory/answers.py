"""Comparison of answers: VQA's normalisation and accuracy, letters of choices, yes and no."""

from __future__ import annotations

import re
from collections.abc import Sequence


# The rules of the VQA challenge's evaluation (visualqa.org/evaluation.html).
_NUMBERS = dict(
    zip(
        ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
        [0, *range(11)],
        strict=True,
    )
)
_ARTICLES = {"a", "an", "the"}
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am mightn't mightn't've "
    "might've mustn't must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've "
    "somebody'd somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd "
    "there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're "
    "what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't "
    "would've wouldn't wouldn't've y'all y'all'll you'd you'd've you'll you're you've"
)
_RESTORED = {word.replace("'", ""): word for word in _CONTRACTIONS.split()}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_FULL_STOP = re.compile(r"(?<!\d)\.(?!\d)")


def normalise_vqa(text: str) -> str:
    """
    An answer as the VQA challenge compares it: lower case, number words as digits, no articles, no punctuation but in
    numbers, contractions with their apostrophes.

    Example:

        ```py
        >>> normalise_vqa("The two dogs, dont know.")
        "2 dogs don't know"
        ```
    """
    text = re.sub(r"[\n\t]", " ", text).strip()
    number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        text = text.replace(mark, "" if beside_blank or number else " ")
    text = _FULL_STOP.sub("", text)
    words = (str(_NUMBERS.get(word, word)) for word in text.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """
    VQA's accuracy: an answer is right if three of ten people gave it. The mean over each choice of all people but one,
    of min(1, matches / 3).

    Raises:
        `ValueError`: if there is no reference.
    """
    if not references:
        raise ValueError("references is empty; VQA's accuracy compares with people's answers.")
    said, given = normalise_vqa(answer), [normalise_vqa(reference) for reference in references]
    if len(given) == 1:
        return float(said == given[0])
    matches = given.count(said)
    scores = [min(1.0, (matches - (said == reference)) / 3) for reference in given]
    return sum(scores) / len(scores)


def normalise(text: str) -> str:
    """For exact match: lower case, without punctuation at the ends and without repeated blanks."""
    return re.sub(r"\s+", " ", text).strip(" .,!?\n\t").lower()


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, both normalised by [`normalise`]."""
    return float(normalise(answer) in {normalise(reference) for reference in references})


def chosen_letter(answer: str, number: int) -> str | None:
    """
    The letter of a multiple choice: the answer itself, its beginning (`B.`, `B)`, `(B)`), or `answer is B`. `None` if
    it names none of the `number` choices.
    """
    letters = "".join(chr(ord("A") + index) for index in range(number))
    text = answer.strip()
    match = re.match(rf"\(?([{letters}])(?![A-Za-z'])", text) or re.search(
        rf"answer is:?\s*\(?([{letters}])(?![A-Za-z'])", text
    )
    return match[1] if match else None


def yes_or_no(answer: str) -> str:
    """
    `yes` or `no`, as POPE reads an answer: `no` if its first sentence has the word no or not.
    """
    words = re.findall(r"[a-z']+", answer.split(".")[0].lower())
    return "no" if {"no", "not"} & set(words) else "yes"
