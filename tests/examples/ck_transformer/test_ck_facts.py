"""The fact base, and the search in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ck import FactBase
from ck.data.files import DataFileError
from ck.data.samples import Sample
from ck.knowledge.retrieval import WordEmbedder, recall, top_facts

from tests.examples.ck_transformer._layouts import dump, write_kbref, write_wordnet
from tests.examples.ck_transformer.conftest import SAMPLES, TOKENIZER


def test_facts_of_several_files_are_joined_and_cut_into_sentences(tmp_path: Path) -> None:
    write_kbref(tmp_path)
    base = FactBase.from_json(tmp_path / "Wikipedia.json", tmp_path / "ConceptNet.json")
    assert base.of("Dudu.n.01") == ["A dudu can cut wood.", "It is old.", "A dudu can paint houses."]
    assert base.of("baba") == ["A baba can heat soup."] and base.of("unknown") == [] and len(base) == 5
    assert base.restricted(["gigi", "nothing"]).facts == {"gigi": ["People carry stones with a gigi."], "nothing": []}
    base.save(tmp_path / "all.json")
    assert FactBase.from_json(tmp_path / "all.json").facts == base.facts


def test_bad_fact_files_are_named_with_their_line(tmp_path: Path) -> None:
    dump(tmp_path / "facts.json", {"a": "Fine.", "b": ["x", 3]})
    with pytest.raises(DataFileError, match=r"facts.json, line 3: facts of 'b' must be a text or a list of texts"):
        FactBase.from_json(tmp_path / "facts.json")


def test_glosses_of_wordnet_are_facts(tmp_path: Path) -> None:
    write_wordnet(tmp_path)
    base = FactBase.from_wordnet(tmp_path, ["fruit.n.01", "Traffic light", "unknown"])
    own = ["fruit is ripe part of a plant", "fruit is it is sweet"]
    assert base.of("fruit") == [*own, "fruit is a kind of food, any substance that can be eaten"]
    assert base.of("traffic_light") == ["traffic light is a visual signal"] and base.of("unknown") == []
    assert FactBase.from_wordnet(tmp_path, ["fruit"], hypernyms=0).of("fruit") == own
    second = "thing is any substance that can be eaten"
    assert FactBase.from_wordnet(tmp_path, ["thing.n.02"]).of("thing") == [second]
    assert FactBase.from_wordnet(tmp_path, ["thing"], hypernyms=0).of("thing")[2:] == [second]


def test_bad_wordnet_files_are_named_with_their_line(tmp_path: Path) -> None:
    offsets = write_wordnet(tmp_path)
    index = tmp_path / "index.noun"
    text = index.read_text()
    index.write_text(text.replace(f"{offsets['fruit']:08d}", f"{offsets['fruit'] + 3:08d}"))
    with pytest.raises(DataFileError, match=r"data.noun, line 3: no synset of offset"):
        FactBase.from_wordnet(tmp_path, ["fruit"])
    index.write_text(text.replace("food n 1", "food n one"))
    with pytest.raises(DataFileError, match=r"index.noun, line 2: no entry of a WordNet index"):
        FactBase.from_wordnet(tmp_path, ["fruit"])


class Letters:
    """Counts of letters, which depend on the image if `by_image`, and a list of what was embedded."""

    def __init__(self, by_image: bool) -> None:
        self.by_image = by_image
        self.seen: list[tuple[str, str]] = []

    def vector(self, text: str, image: str) -> torch.Tensor:
        weights = torch.arange(1, 27) % (len(image) + 2) + 1 if self.by_image else torch.ones(26)
        return F.normalize(torch.tensor([float(text.lower().count(chr(97 + i))) for i in range(26)]) * weights, dim=0)

    def __call__(self, pairs: Sequence[tuple[str, Sample]]) -> torch.Tensor:
        self.seen += [(text, sample.image) for text, sample in pairs]
        return torch.stack([self.vector(text, sample.image) for text, sample in pairs])


BASE = FactBase({"dudu": ["cut wood", "severe timbers", "rocks", "haul"], "baba": ["time", "soap"]})


@pytest.mark.parametrize("by_image", [False, True])
@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_the_most_similar_facts_of_each_category_are_found(count: int, by_image: bool) -> None:
    embed = Letters(by_image)
    found = top_facts(embed, SAMPLES, BASE, count)
    for sample, own in zip(SAMPLES, found, strict=True):
        expression = embed.vector(sample.expression, sample.image)
        for category, facts in zip(sample.categories, own, strict=True):
            cosine = {fact: float(embed.vector(fact, sample.image) @ expression) for fact in BASE.of(category)}
            assert facts == sorted(cosine, key=lambda fact: -cosine[fact])[:count]


@pytest.mark.parametrize("by_image", [False, True])
def test_no_text_is_embedded_twice(by_image: bool) -> None:
    embed = Letters(by_image)
    top_facts(embed, [*SAMPLES, *SAMPLES] * 20, BASE, 3)
    if by_image:  # once per image in every portion of 32 samples
        assert len(embed.seen) == 3 * len(set(embed.seen))
    else:
        assert len(embed.seen) == len({text for text, _ in embed.seen}) == 2 + 6


def test_recall_is_over_expressions_whose_fact_and_target_are_known() -> None:
    first = Sample("a", "a", (1, 1), ((0, 0, 1, 1),) * 2, ("x", "y"), "e", 1, "right")
    unknown = Sample("b", "b", (1, 1), ((0, 0, 1, 1),) * 2, ("x", "y"), "e", 1)
    missing = Sample("c", "c", (1, 1), ((0, 0, 1, 1),) * 2, ("x", "y"), "e", -100, "right")
    assert (
        recall([first, first, unknown, missing], [[["right"], []], [[], ["no", "right"]], [[], []], [[], []]]) == 0.5
    )


def test_words_are_averaged(tmp_path: Path) -> None:
    (tmp_path / "vectors.txt").write_text("3 2\nwood 1 0\ncut 0 1\nrope -1 0.5\n")
    embed = WordEmbedder.from_file(tmp_path / "vectors.txt")
    sample = SAMPLES[0]
    found = embed([("Cut, wood!", sample), ("rope", sample), ("unknown", sample)])
    torch.testing.assert_close(found, F.normalize(torch.tensor([[0.5, 0.5], [-1, 0.5], [0, 0]]), dim=-1))
    table = torch.randn(len(TOKENIZER), 4)
    ids = TOKENIZER("cut wood", add_special_tokens=False)["input_ids"]
    expected = F.normalize(table[ids].mean(0), dim=0)
    torch.testing.assert_close(WordEmbedder.of_tokens(TOKENIZER, table)([("cut wood", sample)])[0], expected)


@pytest.mark.parametrize(
    ("text", "words"), [("a 1 2\nb 1\n", "line 2: 1 numbers, but 2 before"), ("a 1 x\n", "line 1")]
)
def test_bad_word_vectors_are_named_with_their_line(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "vectors.txt").write_text(text)
    with pytest.raises(DataFileError, match=rf"vectors.txt, {words}"):
        WordEmbedder.from_file(tmp_path / "vectors.txt")
