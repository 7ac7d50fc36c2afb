"""Checkpoints continue bit for bit, and FAMO's second look at a batch leaves no trace."""

import copy

import pytest
import torch
from transformers import TrainerCallback

from peft_ext.mtl import MTLTrainer
from tests.mtl._models import (
    TASKS,
    TwoLayers,
    assert_identical,
    config,
    samples,
    task_losses,
    trained,
    trainer,
)


@pytest.mark.parametrize("method", ["joint", "pcgrad", "graddrop", "nash_mtl", "famo", "gradvac"])
def test_resuming_is_bit_exact(tmp_path, method):
    """Without state, with a random stream, on rows, held weights, feedback, TorchJD; the others' states are alike."""
    if method == "gradvac":
        pytest.importorskip("torchjd")
    options = {
        "mtl_method": method,
        "mtl_method_kwargs": {"update_weights_every": 2} if method == "nash_mtl" else None,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 8,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 3,
        "noise_floor_steps": 2,
    }

    def run(checkpoint=None):
        return trained(tmp_path, model=TwoLayers(dropout=0.2, norm=True), checkpoint=checkpoint, **options)

    whole = run()
    lines = (tmp_path / "gradient_conflicts.jsonl").read_text()
    resumed = run(str(tmp_path / "checkpoint-3"))
    assert_identical(resumed.model, whole.model)
    assert resumed.conflicts.state_dict() == whole.conflicts.state_dict()
    assert (tmp_path / "gradient_conflicts.jsonl").read_text() == lines


class _AtTheStart(TrainerCallback):
    """What the optimiser and the method know when a training begins."""

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.steps = [int(known["step"]) for known in optimizer.state.values()]
        self.logits = self.trainer.aggregator.logits.detach().clone()


def test_a_second_training_keeps_the_methods_state_as_the_optimisers(tmp_path):
    start = _AtTheStart()
    run = start.trainer = trainer(tmp_path, mtl_method="famo", callbacks=[start])
    run.train()
    assert not start.steps and not start.logits.any()
    logits = run.aggregator.logits.detach().clone()
    run.train()
    assert set(start.steps) == {6} and logits.any()
    assert torch.equal(start.logits, logits)


@pytest.mark.parametrize(
    ("method", "options"),
    [("joint", {}), ("pcgrad", {}), ("famo", {}), ("nash_mtl", {"update_weights_every": 4}), ("graddrop", {})],
)
def test_a_second_training_of_a_model_made_anew_is_the_first_again(tmp_path, method, options):
    run = MTLTrainer(
        model_init=lambda: TwoLayers(dropout=0.2, norm=True),
        args=config(tmp_path, mtl_method=method, mtl_method_kwargs=options, conflict_logging_steps=2),
        train_dataset=samples(),
        compute_task_losses_func=task_losses,
    )
    run.train()
    first, state, record = copy.deepcopy(run.model), run.aggregator.state_dict(), run.conflicts.state_dict()
    run.train()
    assert run.model is not first
    assert_identical(run.model, first)
    torch.testing.assert_close(run.aggregator.state_dict(), state, rtol=0, atol=0)
    assert run.conflicts.state_dict() == record


def test_a_state_of_another_method_or_cut_short_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    trained(tmp_path, mtl_method="pcgrad", **options)
    checkpoint = tmp_path / "checkpoint-3"
    with pytest.raises(ValueError, match="written with pcgrad, not famo"):
        trained(tmp_path, mtl_method="famo", checkpoint=str(checkpoint), **options)
    path = checkpoint / "mtl_state.pt"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="not a whole state file"):
        trained(tmp_path, mtl_method="pcgrad", checkpoint=str(checkpoint), **options)


def earlier_state(names):
    """`mtl_state.pt` as the first release wrote it, after three steps with FAMO."""
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3).double(), "exp_avg_sq": torch.ones(3).double()}
    return {
        "method": "famo",
        "tasks": TASKS,
        "aggregator": {
            "generator": torch.Generator().manual_seed(1).get_state(),
            "logits": torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64),
            "optimizer": {**torch.optim.Adam([torch.zeros(3)], lr=0.025).state_dict(), "state": {0: moments}},
            "before": None,
        },
        "conflicts": {
            "tasks": TASKS,
            "steps": [1, 2, 3],
            "epochs": [0.25, 0.5, 0.75],
            "cosines": [[0.5, -0.5, 0.25]] * 3,
            "noise": [True, False],
            "layers": {"trunk.0": [1, 3]},
            "window": [{"grad_norm/a": 2.0}],
            "logged": 2,
        },
        "gradients": {"names": names, "reached": torch.ones(3, len(names), dtype=torch.bool)},
        "logged_losses": [[9.0, 8.0, 7.0]],
        "skipped_steps": 2,
    }


def layout(value):
    """The keys and kinds of values within a state."""
    if isinstance(value, dict):
        return {key: layout(entry) for key, entry in value.items()}
    return type(value)


def test_a_checkpoint_of_the_first_release_loads(tmp_path):
    options = {"mtl_method": "famo", "save_strategy": "steps", "save_steps": 3, "max_steps": 4, "conflict_file": ""}
    written = trained(tmp_path, conflict_granularity="layer", noise_floor_steps=3, **options)
    path = tmp_path / "checkpoint-3" / "mtl_state.pt"
    state = earlier_state([name for name, _ in written.model.named_parameters()])
    new = torch.load(path, weights_only=True)
    del new["conflicts"]["layers"]["trunk.4"]
    assert layout(new) == layout(state)
    torch.save(state, path)
    resumed = trained(tmp_path, checkpoint=str(path.parent), **options)
    record, logs = resumed.conflicts.state_dict(), resumed.state.log_history
    assert record["steps"] == [1, 2, 3, 4] and record["cosines"][:3] == state["conflicts"]["cosines"]
    assert (record["noise"], record["layers"]) == (state["conflicts"]["noise"], state["conflicts"]["layers"])
    assert logs[-1]["skipped_steps"] == 2
    assert 4.5 < logs[-2]["task_loss/a"] < 6  # the mean of 9 and the loss of step 4
    assert all(resumed.mtl_state.gradients.shared)  # every task has reached every parameter
    assert 0 < (resumed.aggregator.logits.detach() - state["aggregator"]["logits"]).abs().max() < 0.03


def test_famo_hears_the_losses_after_the_step_with_the_same_dropout(tmp_path):
    """The replay of a step of size zero returns the first pass's losses, so the logits stay at zero."""
    run = trainer(
        tmp_path, model=TwoLayers(dropout=0.5, norm=True), mtl_method="famo", learning_rate=0.0, logging_steps=1
    )
    run.train()
    assert not bool(run.aggregator.logits.detach().any())
    moving = trained(tmp_path, model=TwoLayers(dropout=0.5), mtl_method="famo", max_steps=4)
    assert bool(moving.aggregator.logits.detach().any())


def test_replaying_leaves_the_training_as_it_was(tmp_path):
    """FAMO with a learning rate of zero for its logits is a fixed weighting: the second pass must not show."""

    def run(feedback):
        result = trainer(
            tmp_path, model=TwoLayers(dropout=0.5, norm=True), mtl_method="famo", mtl_method_kwargs={"lr": 0.0}
        )
        result.aggregator.needs_feedback = feedback
        result.train()
        return result

    with_second, without = run(True), run(False)
    assert_identical(with_second.model, without.model)
