"""Lets tests import the parts of `examples/ck_transformer` as its commands do, and makes tiny models and samples."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LxmertConfig, ViltConfig, VisualBertConfig


FOLDER = Path(__file__).parents[3] / "examples" / "ck_transformer"
sys.path.insert(0, str(FOLDER))

from ck.data.samples import Sample  # noqa: E402
from ck.model.processing import CKProcessor  # noqa: E402
from ck.world.drawing import make_tokenizer  # noqa: E402


FEATURE_SIZE = 5
TOKENIZER = make_tokenizer()
_BERT = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
ENCODER_CONFIGS = {
    "visual_bert": VisualBertConfig(**_BERT, num_hidden_layers=2),
    "lxmert": LxmertConfig(**_BERT, l_layers=1, x_layers=1, r_layers=1, visual_pos_dim=7),
    "vilt": ViltConfig(**_BERT, num_hidden_layers=2, image_size=8, patch_size=4),
}
_BOXES = ((0.0, 0.0, 50.0, 20.0), (10.0, 40.0, 30.0, 90.0), (60.0, 5.0, 99.0, 35.0))
SAMPLES = [
    Sample(
        "a",
        "one",
        (100.0, 100.0),
        _BOXES,
        ("baba", "dudu", "fofo"),
        "something to sever timber",
        1,
        "a dudu can cut wood",
    ),
    Sample("b", "two", (100.0, 200.0), _BOXES[:2], ("dudu", "gigi"), "the one that will haul rocks", 0),
]
# Lists of different lengths, an empty one, and a fact that two candidates share.
FACTS = [
    [["a baba can dry grain", "people cut wood with a baba"], ["a dudu can cut wood"], []],
    [["people carry stones with a dudu", "a dudu can heat soup", "paper", "rope", "a can"], ["a dudu can heat soup"]],
]


def features(sample: Sample) -> torch.Tensor:
    return torch.stack([torch.linspace(-1, 1, FEATURE_SIZE) * (x + y) / 50 + y / 40 for x, y, _, _ in sample.boxes])


@pytest.fixture
def processor() -> Callable[..., CKProcessor]:
    return lambda **options: CKProcessor(TOKENIZER, **options)


@pytest.fixture
def script() -> Callable[[str], ModuleType]:
    """A command of the folder as a module."""

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(f"ck_command_{name}", FOLDER / f"{name}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look there
        spec.loader.exec_module(module)
        return module

    return load
