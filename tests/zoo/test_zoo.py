"""Adapters on transformers' architectures: a sample in every run, all of them with `ZOO=all` (`make test-zoo`)."""

import os

import pytest

from peft_ext import NeuroAdaConfig, PSNConfig

from ._architectures import ARCHITECTURES, SAMPLE
from ._checks import check
from ._left_out import left_out
from ._page import CELL


METHODS = {"NeuroAda": NeuroAdaConfig, "PSN": PSNConfig}
NAMES = ARCHITECTURES if os.environ.get("ZOO") == "all" else SAMPLE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.* is left out of the targets. it fuses")
def test_default_targets_learn_and_merge(name, method, record_property):
    architecture = ARCHITECTURES[name]
    record_property(CELL, ("architectures", name, "Kind", architecture.kind))
    record_property(CELL, ("architectures", name, "Left out", left_out(architecture.build(name))))
    outcome = "works"
    if method == "NeuroAda" and not architecture.linear:
        with pytest.raises(ValueError, match="target_modules=None stands for no layer"):
            check(name, architecture, NeuroAdaConfig(k=2))
        outcome = 'refused: no linear layer; PSN, or `target_modules="all-neurons"`'
    else:
        check(name, architecture, METHODS[method](k=2))
    record_property(CELL, ("architectures", name, method, outcome))
