"""A column budget: the neurons of a weight choose among few of its inputs, so that the update is a LoRA."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_ext import GPSConfig, NeuroAdaConfig, PSNConfig
from peft_ext.export.lora import export_lora
from tests.contract._common import layers_of
from tests.tuners.neuroada._common import adapted, logits


BUDGET = 5


def reference(scores, k):
    """Entries of `[rows, fan_in]` scores by a dense computation."""
    columns = scores.double().sum(0).topk(BUDGET).indices.sort().values
    best = scores[:, columns].topk(k, dim=1).indices
    return columns[best].sort(dim=1).values


def layer_of(model):
    return model.base_model.model[0]


@pytest.mark.parametrize("layer", [nn.Linear(40, 12), nn.Conv2d(10, 12, 2)], ids=["linear", "conv"])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("config_class", [NeuroAdaConfig, PSNConfig])
def test_entries_are_the_best_within_the_best_columns(config_class, layer, ratio):
    config = config_class(k=3, column_budget=BUDGET, neuron_ratio=ratio, target_modules=["0"])
    model = get_peft_model(nn.Sequential(layer), config)
    support = layer_of(model).deltas["default"].support
    expected = reference(layer_of(model).base_matrix().detach().abs(), 3)
    kept = support.row_of_entry().unique()
    assert len(kept) == round(12 * ratio)
    assert torch.equal(support.indices.reshape(-1).view(-1, 3).long(), expected[kept])


def test_scores_and_other_selections():
    scores = torch.randn(12, 40)
    config = GPSConfig(k=2, column_budget=BUDGET, target_modules=["0"]).with_scores({"0": scores})
    support = layer_of(get_peft_model(nn.Sequential(nn.Linear(40, 12)), config)).deltas["default"].support
    assert torch.equal(support.indices.long(), reference(scores.abs(), 2))
    for selection in ("random", "reverse"):
        config = NeuroAdaConfig(k=2, selection=selection, column_budget=BUDGET, target_modules=["0"])
        support = layer_of(get_peft_model(nn.Sequential(nn.Linear(40, 12)), config)).deltas["default"].support
        assert len(support.indices.unique()) <= BUDGET and support.indices.shape == (12, 2)


def test_more_columns_than_inputs_change_nothing():
    layer = nn.Linear(40, 12)
    supports = [
        layer_of(get_peft_model(nn.Sequential(layer), NeuroAdaConfig(k=3, target_modules=["0"], **options)))
        .deltas["default"]
        .indices
        for options in ({}, {"column_budget": 40}, {"column_budget": 99})
    ]
    assert torch.equal(supports[0], supports[1]) and torch.equal(supports[0], supports[2])


def test_saved_loaded_and_served_as_a_lora(tiny, ids, tmp_path):
    model = adapted(tiny("llama"), k=3, column_budget=BUDGET)
    for layer in layers_of(model).values():
        assert torch.linalg.matrix_rank(layer.get_delta_weight("default")) <= BUDGET
    model.save_pretrained(tmp_path / "adapter")
    found = export_lora(tmp_path / "adapter", tmp_path / "lora", rank=BUDGET)
    assert found.rank == BUDGET and not found.errors
    for folder in ("adapter", "lora"):
        loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / folder).eval()
        torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 6}, "k=6 entries per neuron can't be chosen among column_budget=5"),
        ({"selection": "magnitude_layer"}, "needs a selection per neuron"),
        ({"column_budget": 0}, "column_budget=0 must be a whole number"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NeuroAdaConfig(**{"column_budget": BUDGET, **options})


def test_density_is_capped():
    config = PSNConfig(density=0.5, column_budget=BUDGET, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(40, 12)), config)
    assert layer_of(model).deltas["default"].indices.shape == (12, BUDGET)
