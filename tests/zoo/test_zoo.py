"""Adapters on transformers' architectures: a sample in every run, all of them with `ZOO=all` (`make test-zoo`)."""

import os

import pytest

from peft_ext import NeuroAdaConfig, PSNConfig

from ._architectures import ARCHITECTURES, SAMPLE
from ._checks import check
from ._table import COLUMN, left_out


METHODS = {"NeuroAda": NeuroAdaConfig, "PSN": PSNConfig}
NAMES = ARCHITECTURES if os.environ.get("ZOO") == "all" else SAMPLE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.* is left out of the targets. it fuses")
def test_default_targets_learn_and_merge(name, method, record_property):
    architecture = ARCHITECTURES[name]
    record_property(COLUMN, {"left out": left_out(architecture.build(name))})
    if method == "NeuroAda" and not architecture.linear:
        with pytest.raises(ValueError, match="target_modules=None stands for no layer"):
            check(name, architecture, NeuroAdaConfig(k=2))
    else:
        check(name, architecture, METHODS[method](k=2))
