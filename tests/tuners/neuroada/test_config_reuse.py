"""One config object for several adapters, read from a file, or copied: each adapter is its own."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model

from peft_ext import NeuroAdaConfig
from tests.contract._common import fill
from tests.tuners.neuroada._common import logits


TARGETS = ["q_proj", "v_proj"]


def test_two_models_with_one_config(tiny, ids, tmp_path):
    config = NeuroAdaConfig(k=2, selection="random_network", target_modules=TARGETS)
    models = []
    for number in range(2):
        config.seed = number
        models.append(fill(get_peft_model(tiny("llama"), config)).eval())
        models[-1].add_adapter("b", config)
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
        for name, folder in (("default", tmp_path / str(number)), ("b", tmp_path / str(number) / "b")):
            model.set_adapter(name)
            loaded = PeftModel.from_pretrained(tiny("llama"), folder)
            assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("selection", ["magnitude_network", "magnitude"])
def test_copy_after_saving_chooses_anew(tiny, ids, tmp_path, selection):
    config = NeuroAdaConfig(k=2, selection="magnitude_network", target_modules=TARGETS)
    get_peft_model(tiny("llama"), config).save_pretrained(tmp_path / "first")
    model = fill(get_peft_model(tiny("llama"), replace(config, k=3, selection=selection))).eval()
    fresh_config = NeuroAdaConfig(k=3, selection=selection, target_modules=TARGETS)
    fresh = fill(get_peft_model(tiny("llama"), fresh_config)).eval()
    assert torch.equal(logits(model, ids), logits(fresh, ids))
    model.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path / "second"), ids), logits(fresh, ids))


def test_adapter_without_entries_is_not_saved(tiny, ids):
    """A state dict that was made without entries leaves them to be loaded."""
    config = NeuroAdaConfig(k=2, target_modules=TARGETS)
    state = get_peft_model_state_dict(inject_adapter_in_model(config, tiny("llama")))
    values = {key: tensor for key, tensor in state.items() if key.endswith(".weight")}
    model = inject_adapter_in_model(replace(config), tiny("llama"), state_dict=values)
    with pytest.raises(RuntimeError, match=r"can't be saved.*PeftModel\.from_pretrained.*add a new adapter"):
        get_peft_model_state_dict(model)
    with pytest.raises(RuntimeError, match="not known yet"):
        logits(model, ids)


def test_saved_config_needs_scores_for_a_new_adapter(tiny, tmp_path):
    scores = {name: module.weight for name, module in tiny("llama").named_modules() if name.endswith("_proj")}
    config = NeuroAdaConfig(k=2, target_modules=TARGETS, selection="gradient").with_scores(scores)
    get_peft_model(tiny("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"needs scores. Load a saved adapter with PeftModel"):
        get_peft_model(tiny("llama"), NeuroAdaConfig.from_pretrained(tmp_path))
