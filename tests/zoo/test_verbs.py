"""Every verb with every method: it works, or is refused with a reason."""

import os

import pytest

from ._methods import METHODS
from ._page import CELL
from ._verbs import VERBS


ON_A_WEIGHT = "it steers some tokens; a weight acts on all"
# What MoReS refuses: its words, and the reason in the table's.
REFUSED = {
    "several adapters in one batch (`adapter_names`)": ("call the model once per adapter", "one adapter per call"),
    "`merge_adapter`, `unmerge_adapter`": ("acts on some tokens only", ON_A_WEIGHT),
    "`merge_and_unload`": ("acts on some tokens only", ON_A_WEIGHT),
    "`add_weighted_adapter`": ("is not orthonormal", "a mean of orthonormal matrices is not orthonormal"),
    "`hotswap_adapter`": ("only sparse adapters are swapped in place", "load the other one under a name of its own"),
    "`rescale_adapter_scale`": ("no sparse adapters", "it has no scale"),
    "`torch.export`": ("", "which tokens are steered depends on the data"),
    "`peft-ext merge`": ("works for the sparse methods", ON_A_WEIGHT),
    "`peft-ext export --to lora`": ("works for the sparse methods", ON_A_WEIGHT),
    "`peft-ext export --to patch`": ("works for the sparse methods", ON_A_WEIGHT),
}
CASES = [(verb, method) for verb in VERBS for method in METHODS]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(os.environ.get("ZOO") != "all", reason="for the table alone: make test-zoo")
@pytest.mark.parametrize(("verb", "method"), CASES)
def test_verb(verb, method, tmp_path, record_property):
    if method == "MoReS" and verb in REFUSED:
        message, reason = REFUSED[verb]
        with pytest.raises((ValueError, NotImplementedError, RuntimeError), match=message):
            VERBS[verb](method, tmp_path)
        outcome = f"refused: {reason}"
    else:
        VERBS[verb](method, tmp_path)
        outcome = "works"
    record_property(CELL, ("verbs", verb, method, outcome))
