"""Every verb with every method: it works, or is refused with a reason."""

import os

import pytest

from tests.contract import _language_verbs as language
from tests.contract import _verbs as verbs
from tests.contract._case import case_of

from ._page import CELL


VERBS = {
    "`save_pretrained`, `PeftModel.from_pretrained`": verbs.save_and_load,
    "`AutoPeftModelForCausalLM.from_pretrained`": language.auto_classes,
    "`load_adapter` of transformers": language.of_transformers,
    "`add_adapter`, `set_adapter`, `delete_adapter`": lambda case: (verbs.switch(case), verbs.delete(case)),
    "`disable_adapter`": verbs.disable,
    "several adapters in one batch (`adapter_names`)": verbs.mixed_batch,
    "`merge_adapter`, `unmerge_adapter`": verbs.merge,
    "`merge_and_unload`": verbs.merge_and_unload,
    "`add_weighted_adapter`": verbs.weighted,
    "`hotswap_adapter`": verbs.hot_swap,
    "`rescale_adapter_scale`": verbs.scale,
    "`torch.compile`": language.compiled,
    "`torch.export`": language.exported,
    "gradient checkpointing": language.checkpointing,
    "`generate`": language.generation,
    "`copy.deepcopy`, `pickle`": verbs.copies,
    "`peft-ext inspect`": language.inspected,
    "`peft-ext merge`": language.merged_files,
    "`peft-ext export --to lora`": language.as_lora,
    "`peft-ext export --to patch`": language.as_patch,
}
METHODS = {"NeuroAda": "neuroada", "GPS": "gps", "PSN": "psn by k", "MoReS": "mores"}
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(os.environ.get("ZOO") != "all", reason="for the table alone: make test-zoo")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("verb", VERBS)
def test_verb(verb, method, tiny, inputs_of, tmp_path, record_property):
    case = case_of(METHODS[method], "llama", tiny, inputs_of, tmp_path)
    if method == "MoReS" and verb in REFUSED:
        message, reason = REFUSED[verb]
        with pytest.raises((ValueError, NotImplementedError, RuntimeError), match=message):
            VERBS[verb](case)
        outcome = f"refused: {reason}"
    else:
        VERBS[verb](case)
        outcome = "works"
    record_property(CELL, ("verbs", verb, method, outcome))
