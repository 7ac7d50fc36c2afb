"""The thesis's hyperparameters (tables 14–16), typed in again from the thesis."""

from fractions import Fraction

import pytest

from peft_ext import NEUROADA_PRESETS, NEUROADA_SEARCH_SPACES, NeuroAdaConfig


# Learning rates as (mantissa, exponent) just as printed.
TABLES = {
    "table_14": {
        "rates": [(6, -4), (9, -4), (1, -3), (3, -3), (6, -3), (9, -3), (1, -2), (3, -2)],
        "batch_sizes": [8, 16, 32],
        "warmup_ratios": [0.00, 0.06, 0.10],
        "ks": [1, 20],
    },
    "table_15": {
        "rates": [(7, -4), (9, -4), (2, -3), (4, -3), (6, -3), (8, -3), (1, -2), (2, -2)],
        "batch_sizes": [8, 16, 32],
        "warmup_ratios": [0.00, 0.06, 0.10],
        "ks": [1, 20],
    },
    "table_16": {
        "rates": [(6, -5), (9, -5), (5, -4), (7, -4), (9, -4), (3, -3), (6, -3), (9, -3), (1, -2)],
        "batch_sizes": [16],
        "warmup_ratios": [0.06],
        "ks": [1, 5, 10, 20, 50, 100, 300, 500],
    },
}


def test_no_other_tables():
    assert NEUROADA_SEARCH_SPACES.keys() == TABLES.keys()


@pytest.mark.parametrize("table", TABLES)
def test_search_space_is_the_printed_one(table):
    space, printed = NEUROADA_SEARCH_SPACES[table], TABLES[table]
    rates = [float(mantissa * Fraction(10) ** exponent) for mantissa, exponent in printed["rates"]]
    assert list(space.learning_rates) == rates
    assert list(space.batch_sizes) == printed["batch_sizes"]
    assert list(space.warmup_ratios) == printed["warmup_ratios"]
    assert list(space.ks) == printed["ks"]


@pytest.mark.parametrize(
    ("preset", "table", "underlined"),
    [("math_k1", "table_14", (9e-3, 16, 0.06)), ("commonsense_k1", "table_15", (8e-3, 8, 0.10))],
)
def test_best_of_one_per_neuron_is_the_underlined_one(preset, table, underlined):
    best, space = NEUROADA_PRESETS[preset], NEUROADA_SEARCH_SPACES[table]
    assert (best.learning_rate, best.batch_size, best.warmup_ratio) == underlined
    assert (best.k, best.epochs, best.weight_decay) == (1, 3, 0.0)
    assert best.learning_rate in space.learning_rates
    assert best.batch_size in space.batch_sizes
    assert best.warmup_ratio in space.warmup_ratios


@pytest.mark.parametrize("preset", NEUROADA_PRESETS.values(), ids=NEUROADA_PRESETS)
def test_preset_says_where_it_is_from_and_makes_a_config(preset):
    assert preset.source
    assert NeuroAdaConfig(k=preset.k).k == preset.k


def test_presets_can_not_be_changed_by_accident():
    with pytest.raises(AttributeError):
        NEUROADA_PRESETS["math_k1"].k = 2
