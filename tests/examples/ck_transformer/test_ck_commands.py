"""The commands run through, on files in public layouts and in the invented world, and say what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ck import CKTransformer, FactSearch
from ck.runs.comparison import McNemar, correct, mcnemar
from ck.runs.training import SearchCollator
from ck.world.drawing import World
from safetensors.torch import save_file
from transformers import VisualBertModel

from tests.examples.ck_transformer._layouts import dump, write_kbref
from tests.examples.ck_transformer.conftest import ENCODER_CONFIGS, FEATURE_SIZE, SAMPLES, TOKENIZER


Script = Callable[[str], ModuleType]


@pytest.fixture
def kbref(tmp_path: Path) -> list[str]:
    """Arguments for a tiny KB-Ref and a tiny VisualBERT."""
    write_kbref(tmp_path)
    config = type(ENCODER_CONFIGS["visual_bert"])(
        **ENCODER_CONFIGS["visual_bert"].to_dict() | {"visual_embedding_dim": FEATURE_SIZE}
    )
    VisualBertModel(config).save_pretrained(tmp_path / "encoder")
    TOKENIZER.save_pretrained(tmp_path / "encoder")
    save_file({"7": torch.randn(2, FEATURE_SIZE), "8": torch.randn(2, FEATURE_SIZE)}, tmp_path / "f.safetensors")
    paths = {"root": tmp_path, "encoder": tmp_path / "encoder", "features": tmp_path / "f.safetensors"}
    arguments = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    small = ["--steps", "2", "--search-steps", "2", "--batch-size", "2"]
    return ["--data", "kbref", *arguments, "--facts", str(tmp_path / "Wikipedia.json"), *small]


def test_training_on_files_saves_models_and_predictions(script: Script, kbref: list[str], tmp_path: Path) -> None:
    train, out = script("train"), tmp_path / "out"
    assert train.main([*kbref, "--out", str(out)]) == 0
    assert isinstance(CKTransformer.from_pretrained(out / "model"), CKTransformer)
    assert FactSearch.from_pretrained(out / "search").config.variant == "multimodal"
    right = json.loads((out / "predictions.json").read_text())
    assert list(right) == ["8_21"]
    again = tmp_path / "again"
    assert train.main([*kbref, "--trained-search", str(out / "search"), "--no-facts", "--out", str(again)]) == 0
    assert not (again / "search").exists()
    script("tables").main(["mcnemar", str(out / "predictions.json"), str(again / "predictions.json")])


def test_targets_that_were_not_detected_count_as_missed(script: Script, kbref: list[str], tmp_path: Path) -> None:
    found = [{"image_id": "7", "category": "dudu", "bbox": [10, 5, 20, 30], "score": 0.9}]
    found += [{"image_id": "7", "category": "baba", "bbox": [50, 5, 9, 9], "score": 0.8}]
    dump(tmp_path / "found.json", found)  # nothing in image 8, the only one to test on
    arguments = [*kbref, "--detections", str(tmp_path / "found.json"), "--out", str(tmp_path / "out")]
    script("train").main(arguments)
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == {"8_21": False}


def test_tables_have_a_row_for_each_value(script: Script, kbref: list[str], tmp_path: Path) -> None:
    tables = script("tables")
    tables.main(["search", *kbref, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "table_search.json").read_text())
    assert [row["facts"] for row in rows] == ["none", "word", "text", "multimodal"]
    tables.main(["facts", *kbref, "--values", "0", "--out", str(tmp_path)])
    assert [row["K"] for row in json.loads((tmp_path / "table_facts.json").read_text())] == [0]


def test_adapted_models_of_the_world_are_saved_and_merged(script: Script, tmp_path: Path) -> None:
    sizes = {"samples": 16, "steps": 2, "search-steps": 2, "adapt-steps": 2, "adapt-samples": 16, "test-samples": 8}
    sizes |= {"trials": 1, "seeds": 1, "pretraining-steps": 2}
    script("adapt").main([*(f"--{name}={value}" for name, value in sizes.items()), f"--out={tmp_path}"])
    rows = {row["method"]: row for row in json.loads((tmp_path / "adapt.json").read_text())}
    assert list(rows) == ["before", "neuroada", "gps", "lora", "full"]
    # Two layers of four 64x64 maps, one of 64x128, one of 128x64.
    assert rows["neuroada"]["encoder_parameters"] == 2 * (4 * 64 + 128 + 64)
    assert rows["gps"]["encoder_parameters"] == 2 * rows["neuroada"]["encoder_parameters"]  # and as many biases
    assert rows["lora"]["encoder_parameters"] == 2 * 8 * (4 * 128 + 2 * 192)
    assert rows["neuroada"]["file_bytes"] < rows["lora"]["file_bytes"] < rows["full"]["file_bytes"]


def test_search_sees_random_facts_half_of_the_time() -> None:
    world = World(0)
    samples = world.samples("train", 400)
    collate = SearchCollator(SearchProcessor(), world.features, world.facts, seed=0)
    batch = collate(samples)
    assert 0.4 < float(batch["labels"].mean()) < 0.6
    true = [sample.fact for sample in samples]
    for fact, own, label in zip(batch["fact_input_ids"], true, batch["labels"].tolist(), strict=True):
        assert (fact == own) == bool(label)


class SearchProcessor:
    """Leaves texts as they are."""

    def texts(self, texts: list[str]) -> tuple[list[str], None]:
        return texts, None

    def regions(self, samples: Any, features: Any) -> dict[str, Any]:
        return {}


def test_test_categories_and_facts_are_held_out() -> None:
    world = World(3)
    train, test = world.samples("train", 200), world.samples("test", 200)
    seen, new = ({c for sample in part for c in sample.categories} for part in (train, test))
    assert not seen & new and not set(world.train_ideas) & set(world.test_ideas)
    assert {idea for name in new for idea, _ in world.known[name]} <= set(world.test_ideas)
    labels = torch.tensor([sample.label for sample in test]).bincount(minlength=6)
    assert labels.min() > 15  # of 33 expected
    for sample in test:  # true of one candidate alone
        ideas = {name: {idea for idea, _ in world.known[name]} for name in sample.categories}
        target = next(idea for idea, fact in world.known[sample.categories[sample.label]] if fact == sample.fact)
        assert sum(target in own for own in ideas.values()) == 1
    looks = torch.stack([world.features(sample) for sample in test])
    assert not torch.equal(looks[0], looks[1]) and torch.equal(looks[0], World(3).features(test[0]))


def test_mcnemar_is_the_exact_binomial_test() -> None:
    first = {str(i): i < 60 for i in range(100)}
    second = {str(i): i >= 1 and i < 69 for i in range(100)}
    assert mcnemar(first, second) == McNemar(1, 9, pytest.approx(22 / 1024))
    assert mcnemar(first, first).p_value == 1
    with pytest.raises(ValueError, match="tested on different samples: 1, such as '99'"):
        mcnemar(first, {name: True for name in first if name != "99"})
    assert correct(SAMPLES, [1, 1]) == {"a": True, "b": False}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "kbref"], "--data kbref needs --root"),
        (["--data", "refcoco", "--root", "r", "--encoder", "e"], "region features are missing"),
        (["--data", "kbref", "--root", "r", "--encoder", "e", "--features", "f"], "facts are missing"),
        (["--num-blocks", "0"], "--num-blocks is 0: must be at least 1"),
    ],
)
def test_missing_options_are_explained(
    arguments: list[str], words: str, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script("train").main(arguments)
    assert words in capsys.readouterr().err
