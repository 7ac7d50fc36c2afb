"""`k_pattern`: another k for some modules."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_ext import NeuroAdaConfig, PSNConfig
from tests.contract._common import layers_of
from tests.tuners.neuroada._common import adapted, logits


PATTERN = {"down_proj": 4, r"layers\.0\..*": 2}


def widths(model):
    return {
        name.removeprefix("base_model.model."): layer.deltas["default"].indices.shape[-1]
        for name, layer in layers_of(model).items()
    }


def test_each_module_has_the_k_of_the_first_pattern_that_fits(tiny):
    found = widths(get_peft_model(tiny("llama"), NeuroAdaConfig(k=1, k_pattern=PATTERN)))
    for name, width in found.items():
        assert width == (4 if name.endswith("down_proj") else 2 if ".0." in name else 1), name
    assert len(found) == 14


def test_the_density_of_psn_gives_way_to_it(tiny):
    found = widths(get_peft_model(tiny("llama"), PSNConfig(density=0.25, k_pattern={"q_proj": 3})))
    assert found["model.layers.0.self_attn.q_proj"] == 3 and found["model.layers.0.self_attn.k_proj"] == 8


@pytest.mark.parametrize("options", [{}, {"selection": "magnitude_layer"}, {"column_budget": 6}], ids=str)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(options, low_cpu_mem_usage, tiny, ids, tmp_path):
    model = adapted(tiny("llama"), k=1, k_pattern=PATTERN, **options)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    other = tiny("llama")
    other.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(other, ids), logits(model, ids))


@pytest.mark.parametrize("options", [{"k_pattern": PATTERN}, {"column_budget": 6}], ids=str)
def test_combined_adapters_have_none_and_no_column_budget(options, tiny):
    model = get_peft_model(tiny("llama"), NeuroAdaConfig(k=1, **options))
    model.add_adapter("b", NeuroAdaConfig(k=1, selection="reverse", **options))
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "both")
    assert model.peft_config["both"].k_pattern is None and model.peft_config["both"].column_budget is None


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"q_proj": 0}, r"k_pattern\['q_proj'\]=0 must be"),
        ({"(": 1}, "is no regular expression"),
        (["q_proj"], "must be a dict"),
        ({"nothing": 2}, "'nothing', which fits no adapted module"),
    ],
)
def test_what_does_not_fit_is_refused(pattern, message, tiny):
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny("llama"), NeuroAdaConfig(k=1, k_pattern=pattern))


def test_a_column_budget_holds_for_it(tiny):
    with pytest.raises(ValueError, match="k=4 entries per neuron can't be chosen among column_budget=3"):
        NeuroAdaConfig(k=1, k_pattern=PATTERN, column_budget=3)
