"""Incidence by hand, and a callback that watches a training without touching it."""

import json
import math
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import default_data_collator

from peft_ext.mtl import ConflictRecorder, GradientConflictCallback, conflict_incidence, log_gradient_conflicts
from peft_ext.mtl.conflicts.plots import (
    plot_angles,
    plot_bars,
    plot_cosines,
    plot_incidence,
    plot_layers,
    read_conflicts,
)
from peft_ext.mtl.conflicts.recorder import cosines_of, pair_cosines
from tests.mtl._jacobians import J3, J4
from tests.mtl._models import (
    LABELS,
    TASKS,
    TwoLayers,
    WithMeanLoss,
    assert_identical,
    jacobian,
    plain_trainer,
    samples,
    task_losses,
    trained,
    trainer,
)


def gramian(rows):
    return (rows.double() @ rows.double().T).numpy()


def test_cosines_of_known_gradients():
    assert pair_cosines(gramian(J3)) == pytest.approx([-0.84119], abs=1e-5)
    assert pair_cosines(gramian(J4)) == pytest.approx([-0.29211867, -0.16609097, -0.60647845], abs=1e-7)
    with_zero = cosines_of(gramian(torch.cat([J3, torch.zeros(1, 3)])))
    assert np.isnan(with_zero[2]).all()
    assert np.isnan(with_zero[:, 2]).all()


def test_incidence_averages_over_steps_the_share_of_defined_pairs():
    nan = float("nan")
    steps = [[-0.1, 0.2, -0.3], [0.1, nan, nan], [nan, nan, nan], [-0.5, 0.5, nan]]
    assert conflict_incidence(steps) == pytest.approx(100 * (2 / 3 + 0 + 1 / 2) / 3)
    assert conflict_incidence([0.0]) == 0.0  # orthogonal gradients do not conflict
    assert math.isnan(conflict_incidence([nan]))


def test_recorder_sums_up_by_window_half_and_pair(tmp_path):
    recorder = ConflictRecorder(["a", "b"], str(tmp_path / "x.jsonl"))
    for step, cosine in enumerate([0.5, -0.5, -0.1, -0.2], start=1):
        recorder.record(step, step / 4, np.array([[1.0, cosine], [cosine, 1.0]]), np.array([1.0, 2.0]))
        if step == 2:
            assert recorder.logs(4)["gradient_conflict/incidence"] == 50.0
    logs = recorder.logs(4)
    assert logs["gradient_conflict/incidence"] == 100.0
    assert logs["gradient_conflict/incidence_all"] == 75.0
    assert logs["gradient_conflict/incidence_last_half"] == 100.0
    assert logs["gradient_conflict/mean_cos"] == pytest.approx(-0.15)
    assert logs["gradient_conflict/cos/a__b"] == pytest.approx(-0.15)
    assert logs["gradient_conflict/mean_abs_cos"] == pytest.approx(0.15)
    assert recorder.logs(4).get("gradient_conflict/incidence") is None  # nothing new
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[1]["cos"] == [-0.5]


class Noisy(WithMeanLoss):
    def __init__(self):
        TwoLayers.__init__(self, dropout=0.3, norm=True)


def plain(folder, callbacks=(), **options):
    return plain_trainer(folder, Noisy(), callbacks, **options)


def probe_batch(data=None):
    return default_data_collator(samples(12, seed=9) if data is None else data)


WITH_FLOOR = {"noise_floor": True, "data_collator": default_data_collator}


def probe_of(options):
    return samples(12, seed=9) if "noise_floor" in options else probe_batch()


def probe_losses(model, batch):
    outputs = {key: value for key, value in model(**batch).items() if key in TASKS}
    return task_losses(outputs, {name: batch[name] for name in LABELS})


@pytest.mark.parametrize("options", [{}, {**WITH_FLOOR, "layerwise": True}], ids=["plain", "everything"])
def test_watching_changes_no_bit_of_the_training(tmp_path, options):
    alone = plain(tmp_path / "alone")
    alone.train()
    callback = GradientConflictCallback(probe_of(options), probe_losses, every_n_steps=2, **options)
    watched = plain(tmp_path / "watched", [callback])
    watched.train()
    assert_identical(watched.model, alone.model)
    assert callback.recorder.steps == [2, 4, 6]
    assert callback.recorder.tasks == TASKS


def test_measured_cosines_are_those_of_autograd(tmp_path):
    callback = GradientConflictCallback(probe_batch(), probe_losses, every_n_steps=6)
    model = WithMeanLoss()
    run = plain(tmp_path)
    callback.measure(model, run.args, run.state)
    losses = probe_losses(model, probe_batch())
    rows = jacobian([losses[task] for task in TASKS], list(model.trunk.parameters()))
    assert callback.recorder.cosines[0] == pytest.approx(pair_cosines(gramian(rows)), abs=1e-6)


def test_one_batch_per_task_uses_the_models_own_loss(tmp_path):
    batches = {
        task: [
            {name: row[name] if name in ("x", f"labels_{task}") else row["labels_c"] for name in row}
            for row in samples(12, seed=9)
        ]
        for task in ("a", "b")
    }
    callback = GradientConflictCallback(batches, every_n_steps=3, **WITH_FLOOR)
    plain(tmp_path, [callback]).train()
    assert callback.recorder.pairs == ["a__b"]
    assert len(callback.recorder.noise) == 2 * 2


def test_the_noise_floor_compares_every_other_sample_with_the_rest(tmp_path):
    model, data, run = WithMeanLoss(), samples(12, seed=9), plain(tmp_path)
    callback = GradientConflictCallback(data, probe_losses, **WITH_FLOOR)
    callback.measure(model, run.args, run.state)
    halves, cosines = [probe_losses(model, probe_batch(half)) for half in (data[::2], data[1::2])], []
    for task in TASKS:
        rows = jacobian([losses[task] for losses in halves], list(model.trunk.parameters()))
        cosines.append(pair_cosines(gramian(rows))[0])
    line = json.loads((tmp_path / "gradient_conflicts.jsonl").read_text())
    assert line["noise_cos"] == pytest.approx(cosines, abs=1e-6)


def test_reporters_get_the_numbers(tmp_path):
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        """Stands where TensorBoard's callback does."""

        def __init__(self):
            self.seen = {}

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen |= logs

    reporter = Reporter()
    run = plain(tmp_path, [reporter])
    log_gradient_conflicts(run, GradientConflictCallback(probe_batch(), probe_losses, every_n_steps=1))
    run.train()
    assert "gradient_conflict/incidence" in reporter.seen
    assert "gradient_conflict_incidence_all" in reporter.seen
    assert any("gradient_conflict/cos/a__b" in entry for entry in run.state.log_history)


def test_a_resumed_training_continues_the_file(tmp_path):
    def watched(checkpoint=None):
        data = samples(12, seed=9)
        callback = GradientConflictCallback(data, probe_losses, every_n_steps=1, layerwise=True, **WITH_FLOOR)
        run = plain(tmp_path, [callback], save_strategy="steps", save_steps=3)
        run.train(resume_from_checkpoint=checkpoint)
        return callback.recorder

    whole = watched()
    lines = (tmp_path / "gradient_conflicts.jsonl").read_text()
    resumed = watched(str(tmp_path / "checkpoint-3"))
    assert (tmp_path / "gradient_conflicts.jsonl").read_text() == lines
    assert resumed.summary(6) == whole.summary(6)
    watched()  # from the start: not added to what another run left
    assert (tmp_path / "gradient_conflicts.jsonl").read_text() == lines


def test_every_training_has_a_file_and_a_record_of_its_own(tmp_path):
    run = trainer(tmp_path, mtl_method="pcgrad")
    for _ in range(2):
        run.train()
        assert run.conflicts.steps == [1, 2, 3, 4, 5, 6]
        assert len((tmp_path / "gradient_conflicts.jsonl").read_text().splitlines()) == 6


def test_a_model_with_a_part_called_module_is_watched_whole(tmp_path):
    class Named(WithMeanLoss):
        def __init__(self):
            super().__init__()
            self.module = torch.nn.Linear(1, 1)

    run = plain(tmp_path)
    callback = GradientConflictCallback(probe_batch(), probe_losses)
    callback.measure(Named(), run.args, run.state)
    assert callback.recorder.tasks == TASKS


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="every_n_steps=0"):
        GradientConflictCallback({"a": {}}, every_n_steps=0)
    for probe in (None, {}, [1], {"x": torch.zeros(2)}, {"a": [{"x": torch.zeros(2)}]}):
        with pytest.raises(ValueError, match="probe must be a batch"):
            GradientConflictCallback(probe)
    for probe, losses in (({"a": {"x": torch.zeros(2)}}, None), (probe_batch(), probe_losses)):
        with pytest.raises(ValueError, match="rows of a collated batch need not be samples"):
            GradientConflictCallback(probe, losses, **WITH_FLOOR)
    args, state = SimpleNamespace(output_dir=".", should_save=False), SimpleNamespace(global_step=0, epoch=0.0)
    with pytest.raises(ValueError, match=r"no loss for probe\['a'\]"):
        GradientConflictCallback({"a": {"x": torch.zeros(2, 6)}}).measure(TwoLayers(), args, state)


def test_figures_come_with_their_data(tmp_path):
    pytest.importorskip("matplotlib")
    run = trained(tmp_path / "run", mtl_method="pcgrad", conflict_granularity="layer", max_steps=12)
    read = read_conflicts(str(tmp_path / "run" / "gradient_conflicts.jsonl"))
    np.testing.assert_allclose(read["cos"], np.stack(run.conflicts.cosines))
    runs = {"PCGrad": read, "again": read}
    plot_incidence(runs, str(tmp_path / "incidence.png"))
    plot_bars(runs, str(tmp_path / "bars.png"), floor=20.0)
    plot_cosines(read, str(tmp_path / "cosines.png"))
    plot_angles(read, str(tmp_path / "angles.png"))
    plot_layers(read, str(tmp_path / "layers.png"))
    for name in ("incidence", "bars", "cosines", "angles", "layers"):
        header = (tmp_path / f"{name}.png").read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", header[16:24])) > 100
        json.loads((tmp_path / f"{name}.json").read_text())
    bars = json.loads((tmp_path / "bars.json").read_text())["runs"]["PCGrad"]
    assert bars["all"] == pytest.approx(run.conflicts.incidence())
    assert bars["last_half"] == pytest.approx(run.conflicts.incidence(last_half_of=12))
    counts = json.loads((tmp_path / "angles.json").read_text())["counts"]
    assert all(sum(values) == 12 for values in counts.values())
    epochs = json.loads((tmp_path / "incidence.json").read_text())["PCGrad"]
    assert epochs["epoch"] == [1, 2, 3]
