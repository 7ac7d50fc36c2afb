"""One run of the whole chain: train the fact search, find facts, train the classifier, test it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..data.samples import Features, Sample, geometry
from ..knowledge.facts import FactBase
from ..knowledge.retrieval import Embedder, EncoderEmbedder, WordEmbedder, recall, top_facts
from ..model.classifier import CKTransformer
from ..model.config import CKTransformerConfig, FactSearchConfig
from ..model.processing import CKProcessor
from ..model.search import FactSearch
from . import comparison
from .training import ClassifierCollator, Recipe, SearchCollator, fit, predict


@dataclass
class Task:
    """
    Args:
        train, test (`list[Sample]`): samples.
        facts (`FactBase`): what is known of all categories.
        features (`Features`): region features.
        tokenizer (`PreTrainedTokenizerBase`): of the encoder.
        make_encoder (`Callable[[], PreTrainedModel]`): a fresh copy of the encoder to begin from.
        feature_size (`int`): width of the region features.
        word_embedder (`Embedder`, *optional*): for the search by words; by default the encoder's input embeddings.
    """

    train: list[Sample]
    test: list[Sample]
    facts: FactBase
    features: Features
    tokenizer: Any
    make_encoder: Callable[[], Any]
    feature_size: int
    word_embedder: Embedder | None = None


@dataclass(frozen=True)
class Settings:
    """The thesis's choices, and how long to train."""

    search: str = "multimodal"  # or "text", "word", "none"
    num_facts: int = 3
    num_blocks: int = 2
    num_heads: int = 12
    no_facts: bool = False
    loss: str = "cross_entropy"
    search_loss: str = "mse"
    max_length: int = 64
    dropout: float = 0.1
    search_recipe: Recipe = field(default_factory=Recipe)
    recipe: Recipe = field(default_factory=Recipe)

    def but(self, **changes: Any) -> Settings:
        return replace(self, **changes)


@dataclass
class Facts:
    """Facts found for the answerable samples of both splits, the best first, and the embedder that found them."""

    train: list[list[list[str]]]
    test: list[list[list[str]]]
    embed: Embedder

    def recall(self, samples: list[Sample], count: int) -> float:
        return recall(answerable(samples), [[facts[:count] for facts in own] for own in self.test])


def train_search(task: Task, settings: Settings) -> FactSearch:
    """The fact search, trained on the samples whose fact is known and the categories that they show."""
    samples = [sample for sample in answerable(task.train) if sample.fact]
    if not samples:
        raise ValueError("no training sample names its fact: train the fact search on KB-Ref, and load it from there.")
    model = with_encoder(FactSearch, FactSearchConfig, task, variant=settings.search, loss=settings.search_loss)
    model.set_mean(*mean_inputs(task))
    processor = CKProcessor(task.tokenizer, max_length=settings.max_length)
    seen = task.facts.restricted(category for sample in samples for category in sample.categories)
    collate = SearchCollator(processor, task.features, seen, settings.search_recipe.seed)
    fit(model, samples, collate, settings.search_recipe)
    return model


def answerable(samples: list[Sample]) -> list[Sample]:
    """Those whose target is among the candidates. The others teach nothing, and no model can get them right."""
    return [sample for sample in samples if sample.label >= 0]


def with_encoder(model_class: Any, config_class: Any, task: Task, **options: Any) -> Any:
    """A model of `model_class` whose encoder is a copy of the task's."""
    encoder = task.make_encoder()
    config = config_class(encoder_config=encoder.config, feature_size=task.feature_size, **options)
    model = model_class(config)
    model.encoder.load_state_dict(encoder.state_dict())
    return model


def mean_inputs(task: Task, most: int = 1000) -> tuple[Any, Any]:
    """Region features and boxes of up to 1000 training samples."""
    samples = answerable(task.train)[:most]
    features = torch.cat([task.features(sample) for sample in samples])
    return features, torch.cat([geometry(sample.boxes, sample.size) for sample in samples])


def find_facts(task: Task, settings: Settings, count: int, search: FactSearch | None = None) -> Facts:
    """
    The `count` best facts of each candidate.

    Args:
        task ([`Task`]), settings ([`Settings`]): what to search in and how.
        count (`int`): the largest K that will be used.
        search ([`FactSearch`], *optional*): a trained one; by default it is trained here.
    """
    if settings.search == "word":
        table = task.make_encoder().get_input_embeddings().weight.detach()
        embed = task.word_embedder or WordEmbedder.of_tokens(task.tokenizer, table)
    else:
        search = search or train_search(task, settings)
        search.to("cuda" if torch.cuda.is_available() else "cpu")
        processor = CKProcessor(task.tokenizer, max_length=settings.max_length)
        embed = EncoderEmbedder(search, processor, task.features)
    found = (top_facts(embed, answerable(samples), task.facts, count) for samples in (task.train, task.test))
    return Facts(*found, embed)


@dataclass
class Result:
    """A trained classifier, its processor, and which test samples it gets right."""

    model: CKTransformer
    processor: CKProcessor
    right: dict[str, bool]

    @property
    def accuracy(self) -> float:
        return comparison.accuracy(self.right)


def run(task: Task, settings: Settings, facts: Facts) -> Result:
    """Train the classifier with these facts and test it."""
    model = with_encoder(
        CKTransformer,
        CKTransformerConfig,
        task,
        num_blocks=settings.num_blocks,
        num_heads=settings.num_heads,
        loss=settings.loss,
        dropout=settings.dropout,
    )
    processor = CKProcessor(task.tokenizer, settings.num_facts, settings.max_length, settings.no_facts)
    collate = ClassifierCollator(processor, task.features)
    train, test = answerable(task.train), answerable(task.test)
    fit(model, list(zip(train, facts.train, strict=True)), collate, settings.recipe)
    predicted = predict(model, list(zip(test, facts.test, strict=True)), collate)
    right = {sample.name: False for sample in task.test} | comparison.correct(test, predicted)
    return Result(model, processor, right)
