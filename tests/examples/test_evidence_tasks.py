"""Four domains on one encoder; adapters of domains side by side and merged; merging and unmerging."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "mtl"))

from _benches.runs import Run
from _evidence import merging, problems, tasks, unmerging
from _evidence.merging import Domains, MergeRun
from _evidence.training import logits_of
from _evidence.unmerging import UnmergeRun


MODEL = "stand-in:minilm"
DATA = ("stand-in:movies", "stand-in:tweets")


@pytest.fixture(scope="module")
def rows():
    return tasks.tables(MODEL, 24)


@pytest.fixture
def model():
    return tasks.DomainTasks(problems.load(MODEL, DATA[0]).base.eval(), tasks.DOMAINS, seed=0)


def test_a_row_has_a_sentence_of_every_domain(rows):
    train = rows[0]
    assert [len(part) for part in rows] == [24, 24, 24]
    assert train.columns["input_ids"].shape == (24, 4, tasks.MAX_TOKENS)
    assert set(train.columns) == {"input_ids", "attention_mask", *(f"labels_{task}" for task in tasks.DOMAINS)}
    for number, domain in enumerate(tasks.DOMAINS):
        part = problems.load(MODEL, f"stand-in:{domain}").train
        length = part.lengths[0]
        assert train.columns["input_ids"][0, number, :length].tolist() == part.inputs[0]
        assert int(train.columns["attention_mask"][0, number].sum()) == length


def test_padding_and_the_other_tasks_change_nothing(model, rows):
    inputs = {name: rows[0].columns[name][:6] for name in ("input_ids", "attention_mask")}
    outputs = model.eval()(**inputs)
    changed = inputs["input_ids"].clone()
    changed[:, 1:] = 7
    assert torch.equal(model(changed, inputs["attention_mask"])["movies"], outputs["movies"])
    alone = model(**{name: column[2:3] for name, column in inputs.items()})
    torch.testing.assert_close(alone["tweets"], outputs["tweets"][2:3], atol=1e-5, rtol=1e-4)


def test_a_task_alone_has_the_sentences_and_the_head_that_it_has_among_others(model, rows):
    found = tasks.tables(MODEL, 24, ("tweets",))
    number = tasks.DOMAINS.index("tweets")
    for mine, all_of_them in zip(found, rows, strict=True):
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(mine.columns[name][:, 0], all_of_them.columns[name][:, number])
        assert torch.equal(mine.columns["labels_tweets"], all_of_them.columns["labels_tweets"])
    alone = tasks.DomainTasks(problems.load(MODEL, DATA[0]).base, ("tweets",), seed=0)
    assert torch.equal(alone.heads["tweets"].weight, model.heads["tweets"].weight)


def test_a_search_looks_at_validation_rows_alone_and_a_final_run_at_test_rows():
    for seed, part in ((tasks.SEARCH_SEED, "validation"), (0, "test")):
        record = tasks.execute(Run(MODEL, "joint", "psn", 1e-3, seed, images=80, epochs=1))
        assert {"validation", "test"} & set(record) == {part} == set(record["losses"])
        assert ("gradient_conflict_noise_floor" in record) == (part == "test")


def test_heads_differ_between_tasks_and_seeds(model):
    base = problems.load(MODEL, DATA[0]).base
    other = tasks.DomainTasks(base, tasks.DOMAINS, seed=1)
    weights = [head.weight for made in (model, other) for head in made.heads.values()]
    assert len({tuple(weight.flatten().tolist()) for weight in weights}) == 8


@pytest.fixture(scope="module", params=["neuroada-k2", "lora-r2"])
def domains(request):
    return Domains(MergeRun(MODEL, DATA, request.param, 64, 6, 16, 0.1, 0, 20, 30))


def test_each_adapter_is_trained_on_its_own_domain(domains):
    part = domains.problems[DATA[0]].test.first(30)
    outputs = []
    for name in DATA:
        domains.model.set_adapter(name)
        domains.model.get_base_model().head = domains.heads[DATA[0]]
        outputs.append(logits_of(domains.model, part))
    assert not torch.allclose(*outputs, atol=1e-3)
    assert not torch.equal(domains.heads[DATA[0]].weight, domains.heads[DATA[1]].weight)


def test_linear_merging_is_the_exact_sum_of_the_updates(domains):
    from peft.tuners.tuners_utils import BaseTunerLayer

    domains.combine("linear", 0.6)
    layers = [module for module in domains.model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        parts = [0.6 * delta_of(layer, name) for name in DATA]
        torch.testing.assert_close(delta_of(layer, "merged"), sum(parts), atol=1e-5, rtol=1e-4)
    domains.model.delete_adapter("merged")


def delta_of(layer, name):
    """What an adapter adds to the weight, by merging it."""
    weight = layer.get_base_layer().weight
    before = weight.detach().clone()
    layer.merge(adapter_names=[name])
    delta = layer.get_base_layer().weight.detach() - before
    layer.unmerge()
    return delta


def test_what_is_forgotten_is_measured_with_heads_of_the_pretrained_encoder():
    record = merging.execute(MergeRun(MODEL, DATA, "neuroada-k1", 64, 6, 16, 0.0, 0, 20, 30))
    for name in DATA:  # nothing was learned, so nothing is forgotten
        (other,) = set(DATA) - {name}
        assert record["others"][other][name] == record["pretrained"][name]
    assert set(record["weights"].values()) <= set(merging.WEIGHTS)


def test_loras_update_is_pruned_too_and_its_start_is_the_seeds_whatever_was_drawn_before():
    run = MergeRun(MODEL, DATA, "lora-r2", 64, 2, 16, 0.1, 0, 20, 30)
    first = Domains(run)
    assert set(first.forms) == {"linear", "ties", "dare_linear", "ties_svd", "dare_linear_svd"}
    torch.manual_seed(7)
    again, other = Domains(run), Domains(replace(run, seed=1))

    def factors(domains):
        return {name: value for name, value in domains.model.state_dict().items() if "lora_" in name}

    for name, value in factors(first).items():
        assert torch.equal(factors(again)[name], value)
        assert not torch.equal(factors(other)[name], value)
    first.combine("ties_svd", 1.0)
    layer = next(module for module in first.model.modules() if "merged" in getattr(module, "lora_A", ()))
    assert layer.lora_A["merged"].weight.shape[0] == len(DATA) * 2


def test_ours_leave_no_trace_in_sixteen_bits_where_lora_does():
    drifts = {
        method: unmerging.execute(UnmergeRun(MODEL, DATA[0], method, 64, 16, 0.1, 0, (1, 5), 16))["drift"]
        for method in ("neuroada-k4", "lora-r4")
    }
    assert all(one["changed"] == one["weights"] == one["features"] == 0 for one in drifts["neuroada-k4"])
    assert [one["cycles"] for one in drifts["lora-r4"]] == [1, 5]
    assert drifts["lora-r4"][1]["changed"] > 0.01 and drifts["lora-r4"][1]["features"] > 0
