"""Words of a question are found where they are, each group in a place of its own, in every spelling."""

import re
import unicodedata

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from peft_ext.knockout import find_token_groups
from peft_ext.knockout.prompts.phrases import locate
from peft_ext.knockout.prompts.spans import Segment

from . import _processors as make
from ._phrases import FORMS, matches


WORDS = ["bus", "Bus", "buses", "bush", "omnibus", "blue", "Blue", "light blue", "light", "blues", "green", "Green"]
WORDS += ["caf\u00e9", "cafe\u0301", "cafe", "\ufb01sh", "fish", "Ａ", "a", "猫", "猫犬", "ca\u00adt", "cat", "A's"]
phrases = st.sampled_from([*WORDS, "cafés", "blue bush", "bus light", "a cat"])
separators = st.sampled_from([" ", ", ", "? ", "-", " or ", "  "])
texts = st.lists(st.tuples(st.sampled_from(WORDS), separators), min_size=1, max_size=5)
texts = texts.map(lambda parts: "".join(word + after for word, after in parts).strip())
cuts = st.none() | st.sets(st.integers(1, 30))
examples = settings(max_examples=120, deadline=None, derandomize=True, database=None)


def segment(text, cut=None):
    """A text with a token per character, or one per stretch between the cuts."""
    return Segment(text, [[at if cut is None else sum(edge <= at for edge in cut)] for at in range(len(text))])


def tokens_of(own, start, end):
    return sorted({token for at in range(start, end) if not own.text[at].isspace() for token in own.owners[at]})


@examples
@given(texts, phrases, cuts)
@example("bus Ａ ca\u00adt", "a cat", None)  # the invisible character between them is theirs too
def test_matches_are_those_of_a_search_through_every_stretch(text, phrase, cut):
    own = segment(text, cut)
    expected = [(rank, tokens_of(own, start, end)) for rank, start, end in matches(text, phrase)]
    assert list(map(tuple, own.find(phrase))) == expected


def places_of(own, longer, shorter):
    """The tokens of two options: each the best that is left, the shorter one none that the longer might be."""
    first, second = (
        sorted(((rank, start, set(tokens_of(own, start, end))) for rank, start, end in matches(own.text, phrase)))
        if phrase
        else []
        for phrase in (longer, shorter)
    )
    closed = set(first[0][2]) if first else set()
    if len(FORMS[2](longer)) > len(FORMS[2](shorter)):
        closed |= {token for rank, _, tokens in first if rank < 3 for token in tokens}
    second = [tokens for _, _, tokens in second if not tokens & closed]
    return [first[0][2], second[0]] if first and second else None


@examples
@given(texts, phrases, phrases, cuts)
def test_options_take_the_best_places_that_share_no_token(text, true, false, cut):
    own = segment(text, cut)
    spans = {"true_option": true, "false_option": false}
    longest_first = sorted(spans, key=lambda name: -len(unicodedata.normalize("NFKD", FORMS[2](spans[name]))))
    expected = places_of(own, *(spans[name] for name in longest_first))
    if expected is None:
        with pytest.raises(ValueError, match=r"spans\['(true|false)_option'\]: "):
            locate([own], spans, 0, "first")
    else:
        found = locate([own], spans, 0, "first")
        assert [set(found[name]) for name in longest_first] == expected


@pytest.mark.parametrize(
    "marked",
    [
        "[Bus] or {bush}?",
        "[Buses] or {bushes}?",
        "Is it {light blue} or [blue]?",
        "Is it [blue] or {light blue}?",
        "Is the {light blue} car light blue or [blue]?",
        "Is the sidewalk made of {cobblestone} or [stone]?",
        "Is the {toilet paper} to the left of the [toilet]?",
        "Is the [Car] or the {cart} red?",
        "Are the [cars] or the {car parks} full?",
        "Is it [red] or {red}?",
    ],
)
def test_places_by_hand(marked):
    """Of the words in lower case and the singular, as data sets have them."""
    text = re.sub(r"[\[\]{}]", "", marked)
    where = {}
    for name, bracket in (("true_option", r"\[(.*)\]"), ("false_option", r"\{(.*)\}")):
        plain = re.sub(r"[\[\]{}]", "", marked[: (match := re.search(bracket, marked)).start()])
        where[name] = len(plain), match[1]
    spans = {name: re.sub(r"(?<=bus|ush)es$|(?<=ar)s$", "", words.lower()) for name, (_, words) in where.items()}
    spans = {name: phrase.replace("parks", "park") for name, phrase in spans.items()}
    found = locate([segment(text)], {"question": text, **spans}, 0, "first")
    for name, (start, words) in where.items():
        assert found[name] == tokens_of(segment(text), start, start + len(words))


@pytest.mark.parametrize(
    ("text", "spans", "message"),
    [
        ("Is it a bush?", {"true_option": "bus"}, "'bus' is not in the prompt of row 0 as whole words"),
        ("Is it a cart?", {"objects": "car"}, "'car' is not in the prompt"),
        ("Is it light blue?", {"true_option": "blue", "false_option": "light blue"}, "has no tokens of its own"),
        ("Are they cars?", {"true_option": "car", "false_option": "cars"}, "has no tokens of its own"),
        ("Are they cars?", {"mine": "car", "yours": "cars"}, "spans['mine'] ('car') and spans['yours'] ('cars') come"),
        ("Are they cars?", {"objects": "car", "true_option": "cars"}, "come out as the same tokens"),
        ("Is it red?", {"true_option": "red", "false_option": "red"}, "has no tokens of its own"),
        ("Is it caf\u00e9?", {"objects": "cafe\u0300"}, r"'cafe\u0300') is not"),
        ("Is it caf\u00e9?", {"objects": "cafe\u0300"}, r"'Is it caf\xe9?')"),
    ],
)
def test_one_place_for_two_groups_is_an_error(text, spans, message):
    """And one that shows the characters, where two spellings look alike."""
    with pytest.raises(ValueError) as caught:
        locate([segment(text)], spans, 0, "first")
    assert message in str(caught.value)


def test_one_token_for_two_options_is_an_error():
    with pytest.raises(ValueError, match="one token holds both"):
        locate([segment("left/right", cut=set())], {"true_option": "left", "false_option": "right"}, 0, "first")


def test_groups_of_one_phrase_may_be_the_same():
    found = locate([segment("Is it red?")], {"true_option": "red", "mine": "Red"}, 0, "first")
    assert found["true_option"] == found["mine"]


def test_objects_may_lie_in_longer_ones_that_leave_them_no_other_place():
    found = locate([segment("a coffee table")], {"objects": ["table", "coffee table", "coffee table"]}, 0, "first")
    assert set(found["objects"]) == set(tokens_of(segment("a coffee table"), 2, 14))


@pytest.mark.parametrize("occurrence", ["first", "all"])
def test_a_better_match_wins_wherever_the_image_is(occurrence):
    """The text before the image comes second, among equals."""
    before, after = segment("the bus, the Car, the red"), segment("buses, car, red")
    before.owners = [[owner + 100] for (owner,) in before.owners]
    places = [locate([after, before], {"it": word}, 0, occurrence)["it"] for word in ("bus", "car", "red")]
    red = [12, 13, 14, 122, 123, 124]
    assert places == [[104, 105, 106], [7, 8, 9], red if occurrence == "all" else red[:3]]


@pytest.mark.parametrize("form", [None, "NFC", "NFD", "NFKC"])
def test_spellings_of_the_tokenizer_the_prompt_and_the_phrase_may_differ(form):
    """Tokens are those that the tokenizer's own offsets give."""
    tokenizer = make.tokenizer()
    if form:
        tokenizer.backend_tokenizer.normalizer = getattr(normalizers, form)()
    for spelling in ("NFC", "NFD"):
        text = unicodedata.normalize(spelling, "Is the Ångström café's naïve \ufb01sh red?")
        made = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
        begin, end = made["offset_mapping"][0].T
        for word in ("Ångström", "café", "naïve", "fish", "red"):
            written = unicodedata.normalize(spelling, word.replace("fi", "\ufb01"))
            at = text.index(written)
            expected = (begin < at + len(written)) & (end > at) & (begin < end)
            for phrase in (unicodedata.normalize("NFC", word), unicodedata.normalize("NFD", word)):
                group = find_token_groups(tokenizer, {"input_ids": made["input_ids"]}, spans={"it": phrase})["it"][0]
                assert torch.equal(group, expected), (word, spelling, phrase)
