"""Answers as the benchmarks compare them: values worked out by hand from their rules."""

import pytest

from peft_ext.factory.answers import chosen_letter, exact_match, normalise, normalise_vqa, vqa_accuracy, yes_or_no


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The two dogs, dont know.", "2 dogs don't know"),
        ("A  man\non\ta horse!", "man on horse"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("Mr. Smith.", "mr smith"),
        ("None", "0"),
        ("red/blue", "red blue"),
        ("it's", "it's"),
        ("ten", "10"),
        ("", ""),
    ],
)
def test_vqa_normalisation(text, expected):
    assert normalise_vqa(text) == expected


def test_vqa_accuracy_leaves_each_person_out_once():
    people = ["yes"] * 2 + ["no"] * 8
    # Of ten, two said yes: left out, one remains (1/3); else both (2/3).
    assert vqa_accuracy("Yes.", people) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("no", people) == 1.0
    assert vqa_accuracy("maybe", people) == 0.0
    assert vqa_accuracy("two", ["2"]) == 1.0
    with pytest.raises(ValueError, match="references is empty"):
        vqa_accuracy("yes", [])


@pytest.mark.parametrize(
    "text, letter",
    [("B", "B"), ("B.", "B"), ("(C) blue", "C"), ("The answer is A.", "A"), ("Blue", None), ("D", None)],
)
def test_letters(text, letter):
    assert chosen_letter(text, 3) == letter


@pytest.mark.parametrize(
    "text, expected",
    [("Yes", "yes"), ("No, there is none.", "no"), ("There is not. Yes", "no"), ("Nothing", "yes"), ("a cat", "yes")],
)
def test_yes_and_no(text, expected):
    assert yes_or_no(text) == expected


def test_exact_match():
    assert normalise("  A Dog. ") == "a dog"
    assert exact_match("Red.", ["red"]) == 1.0 and exact_match("reddish", ["red"]) == 0.0
