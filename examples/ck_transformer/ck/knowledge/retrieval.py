"""The top K facts of each candidate, by similarity to the expression (thesis section 3.3.1)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..data.files import DataFileError
from ..data.samples import Features, Sample
from ..model.processing import CKProcessor
from ..model.search import FactSearch
from .facts import FactBase


SAMPLES_PER_STEP = 32


class Embedder(Protocol):
    """Turns texts about images into vectors of unit length. If not `by_image`, a text has one vector for all."""

    by_image: bool

    def __call__(self, pairs: Sequence[tuple[str, Sample]]) -> Tensor: ...


class EncoderEmbedder:
    """
    Args:
        model ([`FactSearch`]): trained.
        processor ([`CKProcessor`]): of the model.
        features (`Features`): region features.
        rows (`int`, *optional*, defaults to 256): texts that are encoded at a time.
    """

    def __init__(self, model: FactSearch, processor: CKProcessor, features: Features, rows: int = 256) -> None:
        self.model, self.processor, self.features, self.rows = model.eval(), processor, features, rows
        self.by_image = model.config.variant == "multimodal"

    @torch.no_grad()
    def __call__(self, pairs: Sequence[tuple[str, Sample]]) -> Tensor:
        device = self.model.device
        samples = {sample.image: sample for _, sample in pairs}
        number = {image: place for place, image in enumerate(samples)}
        regions = self.processor.regions(list(samples.values()), self.features)
        parts = []
        for start in range(0, len(pairs), self.rows):
            own = pairs[start : start + self.rows]
            ids, mask = self.processor.texts([text for text, _ in own])
            images = torch.tensor([number[sample.image] for _, sample in own])
            regions_of_rows = [part[images].to(device) for part in regions.values()]
            parts.append(self.model.embed(ids.to(device), mask.to(device), *regions_of_rows).cpu())
        return torch.cat(parts)


class WordEmbedder:
    """
    The mean of static word vectors, as KB-Ref's baseline searches with Word2Vec (thesis table 3.1, CK-T-Word2Vec).

    Args:
        vectors (`Callable[[str], Tensor]`): a text to its words' vectors, `[words, size]`.
    """

    by_image = False

    def __init__(self, vectors: Callable[[str], Tensor]) -> None:
        self.vectors = vectors

    def __call__(self, pairs: Sequence[tuple[str, Sample]]) -> Tensor:
        means = [own.mean(0) if len(own := self.vectors(text)) else own.new_zeros(own.shape[1]) for text, _ in pairs]
        return F.normalize(torch.stack(means), dim=-1)

    @classmethod
    def of_tokens(cls, tokenizer: Any, weight: Tensor) -> WordEmbedder:
        """With the input embeddings of a model, `[tokens, size]`."""
        return cls(lambda text: weight[tokenizer(text, add_special_tokens=False)["input_ids"]])

    @classmethod
    def from_file(cls, path: str | Path) -> WordEmbedder:
        """With the vectors of a text file of word2vec or GloVe: a word and its numbers on each line."""
        table: dict[str, Tensor] = {}
        size = 0
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                word, *values = line.split()
                if number == 1 and len(values) == 1:  # word2vec's count and size
                    continue
                try:
                    table[word] = torch.tensor([float(value) for value in values])
                except ValueError:
                    raise DataFileError(Path(path), f"line {number}", "no word with its numbers") from None
                size = size or len(values)
                if len(values) != size:
                    raise DataFileError(Path(path), f"line {number}", f"{len(values)} numbers, but {size} before")

        def vectors(text: str) -> Tensor:
            known = [table[word] for word in re.findall(r"\w+", text.lower()) if word in table]
            return torch.stack(known) if known else torch.zeros(0, size)

        return cls(vectors)


def top_facts(
    embed: Embedder, samples: Sequence[Sample], base: FactBase, count: int, progress: bool = False
) -> list[list[list[str]]]:
    """
    For each candidate of each sample its `count` best facts, the best first; fewer where fewer are known.

    Every text is embedded once per image, or once in all where images do not matter.
    """
    found: list[list[list[str]]] = []
    cache: dict[tuple[str, str], Tensor] = {}
    for own in tqdm(list(_portions(samples)), desc="fact search", disable=not progress):
        if embed.by_image:
            cache = {}
        needed: dict[tuple[str, str], tuple[str, Sample]] = {}
        for sample in own:
            texts = [sample.expression, *(fact for category in sample.categories for fact in base.of(category))]
            needed |= {_key(embed, text, sample): (text, sample) for text in texts}
        new = [key for key in needed if key not in cache]
        if new:
            cache |= dict(zip(new, embed([needed[key] for key in new]), strict=True))
        for sample in own:
            expression = cache[_key(embed, sample.expression, sample)]
            found.append([_best(embed, sample, expression, base.of(name), cache, count) for name in sample.categories])
    return found


def _best(
    embed: Embedder, sample: Sample, expression: Tensor, facts: list[str], cache: dict[Any, Tensor], count: int
) -> list[str]:
    if not facts or not count:
        return []
    cosine = torch.stack([cache[_key(embed, fact, sample)] for fact in facts]) @ expression
    return [facts[number] for number in cosine.argsort(descending=True, stable=True)[:count].tolist()]


def _key(embed: Embedder, text: str, sample: Sample) -> tuple[str, str]:
    return text, sample.image if embed.by_image else ""


def _portions(samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
    return (samples[start : start + SAMPLES_PER_STEP] for start in range(0, len(samples), SAMPLES_PER_STEP))


def recall(samples: Sequence[Sample], found: Sequence[Sequence[Sequence[str]]]) -> float:
    """Share of the expressions whose own fact is among those found for the target (of those that have one)."""
    known = [s.fact in own[s.label] for s, own in zip(samples, found, strict=True) if s.fact and s.label >= 0]
    return sum(known) / len(known) if known else float("nan")
