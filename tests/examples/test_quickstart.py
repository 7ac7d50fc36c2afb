"""The quick start: splits, budgets, search and measurements are what its table says, and the script runs through."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import quickstart
import torch
from _quickstart import checks, data, figure, memory, methods, pretraining, report, search, timing
from peft import LoraConfig, get_peft_model
from torch import nn


@pytest.fixture(scope="module")
def digits() -> data.Digits:
    return data.load()


def vit(hidden: int = 16, layers: int = 2) -> nn.Module:
    return pretraining.build(hidden, layers, seed=0)


def adapted(name: str, k: int = 1, hidden: int = 16) -> nn.Module:
    method = next(method for method in methods.methods(k) if method.name == name)
    return method.adapt(pretraining.fresh_task(vit(hidden), seed=0), 0)


# data


def test_splits_cover_all_images_once(digits: data.Digits) -> None:
    """Pixel sums and labels of the parts together are those of the whole set."""
    raw = data.load_digits()
    parts = vars(digits).values()
    assert sum(digits.sizes().values()) == len(raw.target)
    sums = torch.cat([(part.pixel_values + 1).mul(8).sum((1, 2, 3)) for part in parts])
    torch.testing.assert_close(sums.sort().values, torch.as_tensor(raw.images.sum((1, 2))).float().sort().values)


@pytest.mark.parametrize("part", ["pretrain", "pretrain_test", "train", "validation", "test"])
def test_every_part_has_every_class_about_equally_often(digits: data.Digits, part: str) -> None:
    counts = getattr(digits, part).labels.bincount(minlength=data.CLASSES)
    assert len(counts) == data.CLASSES
    assert counts.min() >= 0.9 * counts.max()


def test_shift_only_moves_pixels(digits: data.Digits) -> None:
    image = digits.pretrain.pixel_values[0]
    served = [digits.pretrain[0]["pixel_values"] for _ in range(40)]
    assert any(not torch.equal(other, image) for other in served)
    assert all(torch.equal(other.flatten().sort().values, image.flatten().sort().values) for other in served)


# methods


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("name", ["neuroada", "supertuning"])
def test_neuroada_and_supertuning_train_the_same_number(name: str, k: int) -> None:
    counted, _ = methods.trained_parameters(adapted(name, k))
    assert counted == methods.neuroada_count(vit(), k)


def test_shira_at_k_1_trains_as_many_as_neuroada() -> None:
    """q, v and fc1 at rank 1 cost (2 + 2 + 5) hidden, and one bypass on all six layers costs 9 hidden."""
    assert methods.trained_parameters(adapted("shira")) == methods.trained_parameters(adapted("neuroada"))


@pytest.mark.parametrize("count", [1, 100, 288, 700, 2000])
def test_shira_budget_misses_by_half_its_smallest_change_at_most(count: int) -> None:
    """Leaving out or adding the cheapest kind of layer at the chosen rank comes no closer."""
    rank, kinds = methods.shira_budget(vit(), count)
    cost = {kind: sum(map(sum, shapes)) for kind, shapes in methods.target_shapes(vit()).items()}
    reached = rank * sum(cost[kind] for kind in kinds)
    smallest = rank * min(cost.values())
    assert abs(reached - count) <= max(smallest / 2, smallest - count)


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("bitfit", lambda name: name.endswith("bias") or name.startswith("classifier")),
        ("probe", lambda name: name.startswith("classifier")),
        ("full", lambda name: True),
    ],
)
def test_methods_without_peft_train_what_they_say(name: str, trained) -> None:
    found = {key for key, value in adapted(name).named_parameters() if value.requires_grad}
    assert found == {key for key, _ in vit().named_parameters() if trained(key)}


@pytest.mark.parametrize("name", [method.name for method in methods.methods(1)])
def test_every_method_starts_at_the_pretrained_model_and_trains_the_classifier(name: str, digits) -> None:
    batch = digits.test.batch(8)
    expected = pretraining.fresh_task(vit(), seed=0).eval()(**batch).logits
    model = adapted(name)
    torch.testing.assert_close(model.eval()(**batch).logits, expected)
    assert methods.trained_parameters(model)[1] == sum(value.numel() for value in vit().classifier.parameters())


# search


@pytest.mark.parametrize("trials", [1, 2, 4, 5])
def test_grids_have_equal_length_and_spacing_around_any_centre(trials: int) -> None:
    for centre in (1e-4, 3e-2):
        rates = search.grid(centre, trials)
        assert len(rates) == trials
        assert centre in rates
        assert all(high / low == pytest.approx(search.SPACING, rel=0.05) for low, high in pairwise(rates))


@pytest.mark.parametrize(
    ("outcomes", "best", "edge"),
    [
        ([(0.5, 1.0), (0.9, 1.0), (0.6, 1.0)], 1, None),
        ([(0.9, 1.0), (0.9, 0.5), (0.9, 0.7)], 1, None),
        ([(0.9, 1.0), (0.5, 0.1), (0.5, 0.1)], 0, "lower"),
        ([(0.5, 1.0), (0.5, 0.9), (0.6, 2.0)], 2, "upper"),
        ([(0.5, float("nan")), (0.5, 2.0), (0.5, float("nan"))], 1, None),
        ([(None, 3.0), (None, 2.0), (None, 2.5)], 1, None),
        ([(0.5, 1.0)], 0, None),
    ],
)
def test_best_trial_has_the_highest_accuracy_then_the_lowest_loss(outcomes, best: int, edge: str | None) -> None:
    trials = [search.Trial(10.0**-i, loss, accuracy) for i, (accuracy, loss) in enumerate(outcomes)]
    found = search.Search(trials)
    assert found.best is trials[best]
    assert found.edge == edge


def test_search_without_trials_says_so() -> None:
    with pytest.raises(ValueError, match="trials=0"):
        search.grid(1e-3, 0)


# measurements


def test_interleaved_calls_every_step_once_per_round_and_rotates_who_goes_first() -> None:
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = timing.interleaved(steps, rounds=3, warmup=2)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 5
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert {turn[0] for turn in rounds} == {"a", "b", "c"}
    assert {len(times) for times in seconds.values()} == {3}


def test_relative_time_is_the_median_ratio_within_rounds() -> None:
    """A round in which the machine was busy slows both, and changes nothing."""
    assert timing.relative({"a": [2.0, 200.0, 2.0], "b": [1.0, 100.0, 4.0]}, "b") == {"a": 2.0, "b": 1.0}


def test_peak_counts_what_build_keeps_and_steps_hold_but_not_what_build_frees() -> None:
    mega = 250_000  # float32 numbers in a million bytes

    def build():
        torch.zeros(50 * mega).add(1)
        kept = torch.zeros(mega)

        def step() -> None:
            torch.zeros(3 * mega)
            both = torch.zeros(mega), torch.zeros(mega)
            del both

        return lambda: (step(), kept)

    assert memory.peak_bytes(build) == pytest.approx(4_000_000, rel=1e-3)


def test_peak_of_full_tuning_holds_gradients_and_two_optimiser_states() -> None:
    """All three stand beside each other when the second step's optimiser runs; activations of two images are small."""
    model = vit(hidden=64)
    weights = sum(value.nbytes for value in model.parameters())
    batch = {"pixel_values": torch.randn(2, 1, 8, 8), "labels": torch.tensor([0, 1])}
    peak = memory.peak_bytes(lambda: timing.training_step(model, batch, 1e-3))
    assert 3 * weights <= peak <= 3.5 * weights


# checks and report


def test_roundtrip_passes_on_the_same_base_and_fails_on_another(tmp_path: Path, digits: data.Digits) -> None:
    def logits(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(digits.test.batch(16)["pixel_values"]).logits

    def base(seed: int) -> nn.Module:
        return pretraining.build(16, 1, seed)

    config = LoraConfig(target_modules=list(methods.TARGETS), init_lora_weights=False)
    model = get_peft_model(base(0), config)
    assert all(check.passed for check in checks.roundtrip(model, tmp_path, lambda: base(0), logits))
    failed = {check.name: check.passed for check in checks.roundtrip(model, tmp_path, lambda: base(1), logits)}
    assert not failed["reloaded logits equal bit for bit"]
    assert not failed["merged logits within 1e-05 of the largest"]


def row(**changes) -> report.Row:
    trials = search.Search([search.Trial(1e-3, 1.0, 0.5), search.Trial(3e-3, 0.5, 0.75)])
    values = {"name": "a", "label": "A", "learning_rate": 3e-3, "search": trials, "adapter_parameters": 1000}
    values |= {"head_parameters": 10, "seeds": [0, 1], "scores": [0.5, 0.7], "step_seconds": [0.1], "step_ratio": 0.5}
    values |= {"peak_bytes": 8, "peak_ratio": 2.0, "file_bytes": 4100}
    return report.Row(**(values | changes))


def test_table_is_aligned_and_marks_the_edge_of_a_grid() -> None:
    text = report.table([row(), row(label="A longer label", search=None)], "test accuracy", True, "LoRA").splitlines()
    header, _, rule, first, second, note = text
    assert len(rule) == len(first) == len(second) == len(header)
    assert "0.003*" in first and "0.003*" not in second
    assert "60.0 ± 14.1" in first
    assert "edge" in note


def test_row_in_json_keeps_raw_numbers() -> None:
    written = json.loads(json.dumps(row().as_json()))
    assert written["scores"] == [0.5, 0.7]
    assert written["trained_parameters"] == 1010
    assert written["learning_rate_at_edge"] == "upper"
    assert [trial["learning_rate"] for trial in written["search"]["trials"]] == [1e-3, 3e-3]


def test_figure_draws_equal_counts_beside_each_other_and_others_where_they_are() -> None:
    places = figure._spread([100, 5, 100, 100, 10_000])
    assert (places[1], places[2], places[4]) == (5, 100, 10_000)
    assert places[0] < places[2] < places[3]
    assert places[0] * places[3] == pytest.approx(100**2)


# command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m"], "--dataset"),
        (["--dataset", "d"], "--model"),
        (["--k", "0"], "--k is 0"),
        (["--model", "m", "--dataset", "d", "--lr", "1e-3", "--trials", "3"], "--trials 3"),
    ],
)
def test_contradicting_arguments_are_named(arguments, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quickstart.arguments(arguments)
    assert message in capsys.readouterr().err


def test_language_mode_without_trl_names_the_extra(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(quickstart, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        quickstart.arguments(["--model", "m", "--dataset", "d"])
    assert "pip install 'peft-ext[trl]'" in capsys.readouterr().err


# script


@pytest.mark.slow
def test_smoke_run_writes_table_json_figure_and_adapters(tmp_path: Path, run_script) -> None:
    text, written = run_script("quickstart", "--smoke")
    labels = [method.label for method in methods.methods(1)]
    assert [line for label in labels for line in text.splitlines() if line.startswith(f"{label} ")]
    assert [entry["label"] for entry in written["rows"]] == labels
    assert all(check["passed"] for check in written["checks"]) and len(written["checks"]) == 4
    assert all(len(entry["search"]["trials"]) == 1 for entry in written["rows"])
    assert (tmp_path / "out" / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "adapters" / "neuroada" / "adapter_model.safetensors").exists()
    assert str(tmp_path) not in json.dumps(written)
