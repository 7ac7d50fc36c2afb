"""The path of a gradient scaler, simulated on the CPU."""

import itertools

import torch
from accelerate.optimizer import patch_optimizer_step
from transformers import TrainerCallback

from tests.mtl._models import assert_same_weights, task_losses, trained, trainer, weights


class Scaled(TrainerCallback):
    """Gives a trainer on the CPU the gradient scaler that fp16 training on a GPU has."""

    def __init__(self, scale):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)

    def attach(self, run):
        run.accelerator.scaler = self.scaler
        run.accelerator.unscale_gradients = lambda optimizer=None: self.scaler.unscale_(run.optimizer.optimizer)
        return run

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        optimizer.scaler = self.scaler
        optimizer._accelerate_step_called = False
        optimizer._optimizer_original_step_method = optimizer.optimizer.step
        optimizer._optimizer_patched_step_method = patch_optimizer_step(optimizer, optimizer.optimizer.step)


def scaled(folder, **options):
    callback = Scaled(2.0**16)
    return callback.attach(trainer(folder, callbacks=[callback], **options)), callback.scaler


def test_scaling_changes_nothing(tmp_path):
    for method in ("joint", "nash_mtl", "cagrad", "famo", "graddrop"):
        expected = trained(tmp_path, mtl_method=method)
        ours, scaler = scaled(tmp_path, mtl_method=method, gradient_accumulation_steps=1)
        ours.train()
        assert scaler.get_scale() > 2.0**16  # it was used, and grew
        assert_same_weights(ours.model, expected.model, 1e-6)
        for a, b in zip(ours.conflicts.cosines, expected.conflicts.cosines, strict=True):
            assert abs(a - b).max() < 1e-5


def test_overflow_skips_the_step_and_lowers_the_scale(tmp_path):
    states = []

    def losses(outputs, labels, num_items_in_batch=None):
        found = task_losses(outputs, labels)
        if len(states) == 2:
            found["b"] = found["b"] * 1e36
        states.append((weights(run.model), run.aggregator.state_dict()["generator"], scaler.get_scale()))
        return found

    run, scaler = scaled(tmp_path, losses=losses, mtl_method="pcgrad", weight_decay=0.1)
    run.train()
    unchanged = [all(torch.equal(a[0][n], b[0][n]) for n in a[0]) for a, b in itertools.pairwise(states)]
    assert unchanged == [False, False, True, False, False]
    assert torch.equal(states[3][1], states[2][1])
    assert states[3][2] == states[2][2] / 2
