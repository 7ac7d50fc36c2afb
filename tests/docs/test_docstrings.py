"""Docstrings list what their readers look for, and the documentation shows them."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
from peft import PeftConfig
from transformers import TrainingArguments

import peft_ext
from peft_ext import GPSConfig, MoReSConfig, NeuroAdaConfig, PSNConfig, knockout, mtl
from peft_ext.mtl import MTLConfig


SPARSE = (NeuroAdaConfig, GPSConfig, PSNConfig)
ENTRY = re.compile(r"^    (\w+) \((.+)\):\n((?:        .+\n?)+)", re.M)


def _arguments(config):
    text = inspect.cleandoc(config.__doc__).partition("Args:\n")[2]
    return {name: (kind, " ".join(description.split())) for name, kind, description in ENTRY.findall(text)}


@pytest.mark.parametrize("config", [*SPARSE, MoReSConfig, MTLConfig])
def test_a_config_lists_every_argument_of_its_own_with_its_default(config):
    inherited = {field.name for parent in (PeftConfig, TrainingArguments) for field in fields(parent)} - {"seed"}
    own = {field.name: field.default for field in fields(config) if field.name not in inherited}
    if config is MTLConfig:  # whose seed is the Trainer's
        del own["seed"]
    documented = _arguments(config)
    assert documented.keys() == own.keys()
    for name, default in own.items():
        if name != "requires" and default is not None:
            stated = re.search(r"defaults to `?\"?([^`\"]*)", documented[name][0])[1]
            assert stated == str(default)


@pytest.mark.parametrize("config", [GPSConfig, PSNConfig])
def test_arguments_that_sparse_configs_share_are_explained_alike(config):
    explained, shared = _arguments(config), _arguments(NeuroAdaConfig)
    differs = {"bias", "target_modules"} | (vars(config).keys() & shared.keys())
    for name in shared.keys() - differs - {"modules_to_save"}:
        assert explained[name] == shared[name]


@pytest.mark.parametrize("module", [peft_ext, mtl, knockout], ids=lambda module: module.__name__)
def test_everything_public_names_its_arguments(module):
    for name in module.__all__:
        public = getattr(module, name)
        if not callable(public):
            continue
        for argument in inspect.signature(public).parameters:
            if name.endswith(("Model", "Config", "Arguments")) or argument in ("args", "kwargs"):
                continue
            assert re.search(rf"\b{argument}\b", public.__doc__), f"{name} does not explain {argument}"


@pytest.mark.parametrize("module", [peft_ext, mtl, knockout], ids=lambda module: module.__name__)
def test_the_documentation_shows_every_public_class_and_function(module):
    pages = "".join(path.read_text() for path in (Path(__file__).parents[2] / "docs").rglob("*.md"))
    for name in module.__all__:
        if callable(getattr(module, name)):
            path = f"{module.__name__}.{name}"
            assert pages.count(f"::: {path}\n") + pages.count(f"heading: {path}}}\n") == 1, path
