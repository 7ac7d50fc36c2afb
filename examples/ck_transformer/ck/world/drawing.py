"""
An invented world in which only facts decide. Categories have invented names and four facts each; an expression says
one of the target's facts in other words; objects are coloured at random, so that looks tell nothing.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..data.samples import Sample
from ..knowledge.facts import FactBase


# Each idea has a word in facts and another one in expressions.
VERBS = [
    *(("cut", "sever"), ("carry", "haul"), ("clean", "wash"), ("heat", "warm"), ("mend", "repair"), ("trim", "adorn")),
    *(("store", "keep"), ("weigh", "balance"), ("crush", "grind"), ("paint", "colour"), ("dry", "drain")),
    *(("hide", "veil"), ("lift", "raise"), ("burn", "ignite"), ("polish", "shine"), ("wrap", "cover")),
]
NOUNS = [
    *(("wood", "timber"), ("stones", "rocks"), ("soup", "broth"), ("cloth", "fabric"), ("rope", "cord")),
    *(("paper", "sheets"), ("grain", "wheat"), ("bread", "loaves"), ("coins", "money"), ("houses", "homes")),
    *(("shoes", "boots"), ("plants", "shrubs"), ("tools", "gear"), ("boats", "ships"), ("books", "volumes")),
    *(("fruit", "apples"), ("coal", "fuel"), ("glass", "panes"), ("meat", "beef"), ("roads", "lanes")),
    *(("sand", "gravel"), ("honey", "nectar"), ("wool", "fleece"), ("letters", "mail")),
]
SYLLABLES = ("ba", "du", "fo", "gi", "ka", "lu", "mo", "ne", "po", "ri", "su", "ta", "vo", "we", "xi", "zu")
FACTS = {
    "plain": ("a {name} can {verb} {noun}", "people {verb} {noun} with a {name}"),
    "other": ("a {name} will {verb} the {noun}", "for what must {verb} {noun} there is a {name}"),
}
EXPRESSIONS = ("something to {verb} {noun}", "the one that will {verb} {noun}")
COLOURS, FEATURE_SIZE, FACTS_PER_CATEGORY = 8, 16, 4
SIZE = (100.0, 100.0)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

Idea = tuple[int, int]  # a verb and a noun


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word pieces of the world's words; names are two syllables each."""
    forms = " ".join((*itertools.chain(*FACTS.values()), *EXPRESSIONS)).split()
    words = [*itertools.chain(*VERBS, *NOUNS), *(word for word in forms if "{" not in word)]
    pieces = dict.fromkeys([*SPECIAL, *words, *SYLLABLES, *(f"##{part}" for part in SYLLABLES)])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=made, **dict(zip(names, SPECIAL, strict=True)))


class World:
    """
    Categories for training and others for testing. A quarter of the ideas are facts of the test categories alone, so
    that both are held out.

    Args:
        seed (`int`): of all that is drawn.
        candidates (`int`, *optional*, defaults to 6): objects in an image.
        wording (`str`, *optional*, defaults to `"plain"`): of the facts; `"other"` says the same in another way.
        categories (`tuple[int, int]`, *optional*, defaults to (200, 24)): for training and testing.
    """

    def __init__(
        self, seed: int, candidates: int = 6, wording: str = "plain", categories: tuple[int, int] = (200, 24)
    ) -> None:
        self.random = random.Random(seed)
        self.candidates, self.wording = candidates, wording
        self.colours = torch.randn(COLOURS, FEATURE_SIZE, generator=torch.Generator().manual_seed(seed))
        ideas = list(itertools.product(range(len(VERBS)), range(len(NOUNS))))
        names = ["".join(pair) for pair in itertools.permutations(SYLLABLES, 2)]
        self.random.shuffle(ideas)
        self.random.shuffle(names)
        held_out = len(ideas) // 4
        self.train_ideas, self.test_ideas = ideas[held_out:], ideas[:held_out]
        self.names = {"train": names[: categories[0]], "test": names[categories[0] : sum(categories)]}
        self.known = self.describe("train", self.train_ideas) | self.describe("test", self.test_ideas)

    def describe(self, split: str, ideas: Sequence[Idea]) -> dict[str, list[tuple[Idea, str]]]:
        """Four ideas for each category, and the fact that each is told in."""
        known = {}
        for name in self.names[split]:
            own = self.random.sample(list(ideas), FACTS_PER_CATEGORY)
            known[name] = [(idea, self.fact(name, idea)) for idea in own]
        return known

    def fact(self, name: str, idea: Idea) -> str:
        return self.say(FACTS[self.wording], idea, 0).format(name=name)

    def expression(self, idea: Idea) -> str:
        return self.say(EXPRESSIONS, idea, 1)

    def say(self, forms: Sequence[str], idea: Idea, word: int) -> str:
        return self.random.choice(forms).format(verb=VERBS[idea[0]][word], noun=NOUNS[idea[1]][word], name="{name}")

    @property
    def facts(self) -> FactBase:
        return FactBase({name: [fact for _, fact in own] for name, own in self.known.items()})

    def samples(self, split: str, count: int) -> list[Sample]:
        return [self.sample(split, f"{split} {number}") for number in range(count)]

    def sample(self, split: str, name: str) -> Sample:
        """An image of new objects, and an expression that is true of one of them alone."""
        while True:
            own = tuple(self.random.sample(self.names[split], self.candidates))
            label = self.random.randrange(self.candidates)
            idea, fact = self.random.choice(self.known[own[label]])
            if sum(idea == other for category in own for other, _ in self.known[category]) == 1:
                break
        draw = self.random.uniform
        boxes = tuple((x, y, x + draw(10, 40), y + draw(10, 40)) for x, y in [(draw(0, 60), draw(0, 60)) for _ in own])
        return Sample(name, name, SIZE, boxes, own, self.expression(idea), label, fact)

    def features(self, sample: Sample) -> Tensor:
        """A colour for every object, drawn anew for each image, and some noise."""
        generator = torch.Generator().manual_seed(zlib.crc32(sample.image.encode()))
        chosen = torch.randint(COLOURS, (len(sample.boxes),), generator=generator)
        return self.colours[chosen] + 0.1 * torch.randn(len(chosen), FEATURE_SIZE, generator=generator)
