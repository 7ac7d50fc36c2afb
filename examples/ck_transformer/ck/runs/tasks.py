"""Options of the commands: which task (the invented world, or data of your own), which model, how long."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from ..data.detections import Detections
from ..data.features import StoredFeatures, crops_of
from ..data.kbref import KBRef
from ..data.refcoco import RefCOCO
from ..data.samples import Sample
from ..knowledge.facts import FactBase
from ..knowledge.retrieval import WordEmbedder
from ..model.loading import load_encoder
from ..world.pretraining import WORLD_RECIPE, WORLD_SEARCH, world_task
from .experiment import Settings, Task
from .training import Recipe


def add(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--data", choices=("world", "kbref", "refcoco"), default="world", help="[the invented world]")
    data.add_argument("--root", type=Path, help="folder with the data set's files")
    data.add_argument("--split-by", default="unc", help="RefCOCO: whose splits: unc, google or umd [%(default)s]")
    data.add_argument("--test-split", default="test", help="[%(default)s]")
    data.add_argument("--skip-bad", action="store_true", help="KB-Ref: leave out incomplete expressions and warn")
    data.add_argument("--facts", type=Path, nargs="+", default=[], help="JSON files: {category: facts}")
    data.add_argument("--wordnet", type=Path, help="folder with index.noun and data.noun: glosses as facts")
    data.add_argument("--features", type=Path, help="safetensors file of region features")
    data.add_argument("--images", type=Path, help="or: folder of images, to compute features from crops")
    data.add_argument("--vision", help="folder of the vision model for crops, or efficientnet-lite0")
    data.add_argument("--detections", type=Path, help="JSON of detected boxes, in the place of annotated ones")
    data.add_argument("--max-boxes", type=int, default=10, help="detected boxes per image; the thesis: 10, 100 [10]")
    model = parser.add_argument_group("model and training")
    model.add_argument("--encoder", type=Path, help="folder of a VisualBERT, LXMERT, ViLT or BERT (such as MiniLM)")
    model.add_argument("--word-vectors", type=Path, help="text file of Word2Vec or GloVe, for the search by words")
    model.add_argument("--num-facts", type=int, default=3, help="K, facts per candidate [%(default)s]")
    model.add_argument("--num-blocks", type=int, default=2, help="M, integration blocks [%(default)s]")
    model.add_argument("--loss", default="cross_entropy", help="cross_entropy or margin [%(default)s]")
    model.add_argument("--search-loss", default="mse", help="mse or hinge [%(default)s]")
    model.add_argument("--steps", type=int, help="of the classifier [10000; world: 400]")
    model.add_argument("--search-steps", type=int, help="of the fact search [10000; world: 60]")
    model.add_argument("--batch-size", type=int, help="[64; world: 8]")
    model.add_argument("--learning-rate", type=float, help="[6e-5; world: tuned for its small model]")
    model.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    world = parser.add_argument_group("the invented world")
    world.add_argument("--samples", type=int, default=2400, help="for training [%(default)s]")
    world.add_argument("--test-samples", type=int, default=400, help="[%(default)s]")
    world.add_argument("--pretraining-steps", type=int, default=200, help="of the encoder [%(default)s]")


def check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Stop where something is missing, before anything is read."""
    for name, least in (("num_facts", 0), ("num_blocks", 1), ("max_boxes", 1), ("steps", 1), ("search_steps", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} is {value}: must be at least {least}")
    if options.data == "world":
        return
    for name in ("root", "encoder"):
        if getattr(options, name) is None:
            parser.error(f"--data {options.data} needs --{name}")
    if not options.features and not (options.images and options.vision):
        parser.error("region features are missing: give --features, or --images and --vision")
    if not options.facts and not options.wordnet:
        parser.error("facts are missing: give --facts, --wordnet or both")


def settings(options: argparse.Namespace) -> Settings:
    """The thesis's choices where the options say nothing; for the world, those that fit its size."""
    search, recipe = Recipe(), Recipe()
    sizes = {"num_heads": 4, "dropout": 0.0}
    if options.data == "world":
        search, recipe = WORLD_SEARCH, WORLD_RECIPE
    else:
        sizes = {"num_heads": AutoConfig.from_pretrained(options.encoder).num_attention_heads}
    given = {"batch_size": options.batch_size, "learning_rate": options.learning_rate}
    shared = {"seed": options.seed, **{name: value for name, value in given.items() if value is not None}}
    return Settings(
        num_facts=options.num_facts,
        num_blocks=options.num_blocks,
        loss=options.loss,
        search_loss=options.search_loss,
        search_recipe=replace(search, steps=options.search_steps or search.steps, **shared),
        recipe=replace(recipe, steps=options.steps or recipe.steps, **shared),
        **sizes,
    )


def task(options: argparse.Namespace) -> Task:
    """What the options describe."""
    if options.data == "world":
        return world_task(options.seed, options.samples, options.test_samples, options.pretraining_steps)
    train, test = splits(options)
    categories = [name for sample in (*train, *test) for name in sample.categories]
    facts = FactBase.from_json(*options.facts)
    if options.wordnet:
        facts = facts | FactBase.from_wordnet(options.wordnet, categories)
    features = StoredFeatures(options.features) if options.features else crops_of(options.images, options.vision)
    size = features(train[0]).shape[1]
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    words = WordEmbedder.from_file(options.word_vectors) if options.word_vectors else None
    return Task(train, test, facts, features, tokenizer, lambda: load_encoder(options.encoder, size), size, words)


def splits(options: argparse.Namespace) -> tuple[list[Sample], list[Sample]]:
    """Training and test samples, with annotated or detected boxes."""
    names: dict[str, dict[int, str]] = {}
    if options.data == "kbref":
        kbref = KBRef(options.root, options.skip_bad)
        parts = [kbref.split(name) for name in ("train", options.test_split)]
    else:
        refcoco = RefCOCO(options.root, options.split_by)
        parts = [refcoco.split(name) for name in ("train", options.test_split)]
        names = {"categories": refcoco.categories, "images": {key: name for key, (name, _) in refcoco.images.items()}}
    for name, part in zip(("train", options.test_split), parts, strict=True):
        if not part:
            raise ValueError(f"{options.root} has no samples in the split {name!r}: name another with --test-split.")
    if options.detections:
        detections = Detections(options.detections, **names, most=options.max_boxes)
        parts = [detections.applied(part) for part in parts]
    return parts[0], parts[1]
