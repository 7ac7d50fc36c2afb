"""Samples, features and heads are the same for every method, and the pretrained model stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from _evidence import methods, problems, runs
from _evidence.methods import Method, adapt, refusal, trained_parameters
from _evidence.problems import Part, Pooling
from _evidence.training import logits_of
from torch import nn


TEXT, IMAGES = ("stand-in:minilm", "stand-in:movies"), ("stand-in:dinov2", "stand-in:mnist")
METHODS = [
    "neuroada-k1",
    "gps-k1",
    "lora-r2",
    "shira-k4",
    "supertuning-k4",
    "masked-k4",
    "bitfit",
    "ia3",
    "probe",
    "full",
]


@pytest.fixture(scope="module")
def problem():
    return problems.load(*TEXT)


@pytest.mark.parametrize("kind", ["mean", "first", "last"])
def test_pooling_sees_no_padding(kind):
    hidden = torch.randn(3, 5, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    pooled = Pooling(kind)(hidden, mask)
    for row, length, got in zip(hidden, (5, 3, 1), pooled, strict=True):
        expected = {"mean": row[:length].mean(0), "first": row[0], "last": row[length - 1]}[kind]
        torch.testing.assert_close(got, expected)


def test_features_do_not_depend_on_the_batch(problem):
    whole = logits_of(problem.base, problem.test.first(40))
    one_by_one = torch.cat([logits_of(problem.base, problem.test.first(n + 1))[n:] for n in range(0, 40, 7)])
    torch.testing.assert_close(whole[::7], one_by_one, atol=1e-5, rtol=1e-4)


def test_an_epoch_has_every_sample_once(problem):
    part = problem.train.first(150)
    batches = part.epoch(16, torch.Generator().manual_seed(0))
    assert sorted(index for batch in batches for index in batch) == list(range(150))
    assert max(map(len, batches)) == 16
    lengths = [[part.lengths[index] for index in batch] for batch in batches]
    assert sum(max(row) - min(row) for row in lengths) / len(lengths) < 6  # of sentences of 7 to 17 tokens


def test_parts_share_no_sentence_and_are_always_the_same(problem):
    sentences = [{tuple(ids) for ids in part.inputs} for part in (problem.train, problem.validation, problem.test)]
    assert not (sentences[0] & sentences[1] or sentences[0] & sentences[2] or sentences[1] & sentences[2])
    problems.load.cache_clear()
    again = problems.load(*TEXT)
    assert again.train.inputs == problem.train.inputs and torch.equal(again.test.labels, problem.test.labels)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_starts_as_the_pretrained_model_with_the_same_head(problem, name):
    before = copy.deepcopy(problem.base.state_dict())
    method, part = Method.parse(name), problem.train.first(64)
    model = adapt(problem.base, method, part, seed=3)
    start = adapt(problem.base, Method.parse("probe"), part, seed=3)
    torch.testing.assert_close(logits_of(model, part), logits_of(start, part), atol=1e-5, rtol=1e-4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**part.batch(range(16))).loss.backward()
    optimizer.step()
    assert not torch.allclose(logits_of(model, part), logits_of(start, part), atol=1e-4)
    for key, value in problem.base.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ["shira-k4", "supertuning-k4", "masked-k4"])
def test_sparse_methods_train_as_many_entries_as_neuroada(problem, name):
    part = problem.train.first(64)
    counts = [
        trained_parameters(adapt(problem.base, Method.parse(one), part, 0), Method.parse(one))
        for one in (name, "neuroada-k4")
    ]
    assert counts[0] == counts[1]


def test_masked_training_moves_what_its_count_says(problem):
    method, part = Method.parse("masked-k2"), problem.train.first(64)
    model = adapt(problem.base, method, part, 0)
    before = copy.deepcopy(model.encoder.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        model(**part.batch(range(32))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = sum(int((value != before[name]).sum()) for name, value in model.encoder.state_dict().items())
    assert 0 < moved <= trained_parameters(model, method)[0]


@pytest.mark.parametrize("where", [TEXT, IMAGES])
def test_a_probe_on_cached_features_is_the_probe(where):
    """Its validation result equals that of training the head on the encoder itself."""
    image_size = 28 if where == IMAGES else None
    run = runs.Run(*where, "probe", 64, 5, 16, 1e-2, runs.SEARCH_SEED, 40, 40, image_size)
    cached = runs.execute(run)
    problem = run.problem
    model: nn.Module = adapt(problem.base, Method.parse("probe"), problem.train.first(64), runs.SEARCH_SEED)
    runs.train(model, problem.train.first(64), runs.Recipe(5, 16), 1e-2, runs.SEARCH_SEED)
    plain = runs.evaluate(model, problem.validation.first(40))
    assert cached["validation_result"]["loss"] == pytest.approx(plain["loss"], abs=1e-4)
    assert cached["validation_result"]["correct"] == plain["correct"]


@pytest.mark.parametrize("method", ["neuroada-k1", "neuroada-k1+selection=random", "lora-r2", "shira-k4"])
def test_runs_are_the_same_again(method):
    run = runs.Run(*TEXT, method, 64, 5, 16, 1e-2, 0, 40, 40)
    first, second = ({k: v for k, v in runs.execute(run).items() if "seconds" not in k} for _ in range(2))
    assert first == second


def test_the_search_does_not_touch_the_test_part():
    run = runs.Run(*TEXT, "probe", 64, 2, 16, 1e-2, runs.SEARCH_SEED, 40, 40)
    assert "test_result" not in runs.execute(run)


def test_unknown_methods_are_refused():
    for name in ("neuroada", "lora-k1", "sgd", "lora-r8+selection=random"):
        with pytest.raises(ValueError, match=name.replace("+", r"\+")):
            Method.parse(name)


def test_what_peft_ext_has_not_is_named(problem):
    assert refusal(problem.base, Method.parse("gps-k1+selection=random")) is None
    reason = refusal(problem.base, Method.parse("gps-k1+no_such_option=1"))
    assert reason == "GPSConfig has no option no_such_option"


@pytest.mark.parametrize("kind", [TypeError, ValueError])
def test_a_refused_layer_is_a_reason(problem, monkeypatch, kind):
    def refuse(model, config):
        raise kind("The layer 'stem' pads by itself. Replace it.")

    monkeypatch.setattr(methods, "get_peft_model", refuse)
    assert refusal(problem.base, Method.parse("gps-k1")) == "The layer 'stem' pads by itself"
    assert refusal(problem.base, Method.parse("lora-r8")) is None


def test_too_little_data_is_an_error(monkeypatch):
    monkeypatch.setattr(problems.stand_ins, "data", lambda source: problems.Labelled(["w1 w2"] * 9, torch.zeros(9)))
    with pytest.raises(ValueError, match="9 usable samples"):
        problems.load.__wrapped__(*TEXT)


def test_images_are_scaled_and_normalised():
    encoder = problems.stand_ins.encoder("stand-in:dinov2")
    samples = problems.Labelled(torch.full((2, 1, 8, 8), 255, dtype=torch.uint8), torch.tensor([0, 1]))
    part = problems.encoded(samples, encoder, 28)
    assert isinstance(part, Part) and part.inputs.shape == (2, 3, 28, 28)
    torch.testing.assert_close(
        part.inputs[0, :, 5, 5], torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    )
