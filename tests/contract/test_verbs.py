"""PEFT's verbs for every method, with trained biases and heads where the method has them."""

import pytest

from tests.contract import _language_verbs as language
from tests.contract import _verbs as verbs
from tests.contract._case import case_of
from tests.contract._common import METHODS


ANYWHERE = (
    verbs.start, verbs.save_and_load, verbs.several_folders, verbs.state_dicts, verbs.copies, verbs.switch,
    verbs.disable, verbs.delete,
)  # fmt: skip
# Steering has none of these.
OF_WEIGHTS = (
    verbs.merge, verbs.merge_and_unload, verbs.scale, verbs.mixed_batch, verbs.two_active, verbs.weighted,
    verbs.hot_swap,
)  # fmt: skip
OF_LANGUAGE = (language.auto_classes, language.of_transformers, language.checkpointing, language.generation)
EVERYWHERE = (verbs.start, verbs.save_and_load, verbs.merge, verbs.merge_and_unload)
# An attention's own layers compute without the adapters' path, to other roundings.
OF_ATTENTION = tuple(verb for verb in (*ANYWHERE, *OF_WEIGHTS) if verb not in (verbs.start, verbs.switch))


def cells():
    """Every verb for every method, and what depends on the base for every base."""
    for method in METHODS:
        yield from ((verb, method, "gpt2") for verb in (*ANYWHERE, *OF_WEIGHTS))
        yield from ((verb, method, name) for verb in EVERYWHERE for name in ("llama", "bert", "vit"))
    heads = (verbs.switch, verbs.disable, verbs.delete, verbs.copies, verbs.mixed_batch)
    yield from ((verb, "gps", "vit") for verb in heads)
    for method in ("neuroada with biases", "gps"):
        yield from ((verb, method, "attention") for verb in OF_ATTENTION)
    yield from ((verb, "mores", "llama") for verb in ANYWHERE)
    for method in ("neuroada", "gps over the network", "mores"):
        yield from ((verb, method, "llama") for verb in OF_LANGUAGE)


@pytest.mark.parametrize(
    ("verb", "method", "name"), [pytest.param(*cell, id=f"{cell[0].__name__}-{cell[1]}-{cell[2]}") for cell in cells()]
)
def test_verb(verb, method, name, tiny, inputs_of, tmp_path):
    verb(case_of(method, name, tiny, inputs_of, tmp_path))
