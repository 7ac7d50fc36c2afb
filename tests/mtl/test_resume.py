"""Checkpoints continue bit for bit, and FAMO's second look at a batch leaves no trace."""

import pytest
import torch

from peft_ext.mtl import METHODS
from peft_ext.mtl.aggregators import OWN_METHODS
from tests.mtl._models import TwoLayers, assert_identical_weights, trainer


@pytest.mark.parametrize("method", METHODS)
def test_resuming_is_bit_exact(tmp_path, method):
    if method not in OWN_METHODS:
        pytest.importorskip("torchjd")
    if method in ("upgrad", "dualproj", "fairgrad"):
        pytest.importorskip("scipy" if method == "fairgrad" else "quadprog")
    kwargs = {
        "constant": {"weights": [1.0, 2.0, 0.5]},
        "fairgrad": {"alpha": 2.0},
        "krum": {"n_byzantine": 0},
        "trimmed_mean": {"trim_number": 1},
        "nash_mtl": {"update_weights_every": 2},
    }.get(method)
    options = {
        "mtl_method": method,
        "mtl_method_kwargs": kwargs,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 8,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 3,
        "noise_floor_steps": 2,
    }

    def run(folder, checkpoint=None):
        result = trainer(folder, model=TwoLayers(dropout=0.2, norm=True), **options)
        result.train(resume_from_checkpoint=checkpoint)
        return result

    whole = run(tmp_path / "whole")
    lines = (tmp_path / "whole" / "gradient_conflicts.jsonl").read_text()
    resumed = run(tmp_path / "whole", str(tmp_path / "whole" / "checkpoint-3"))
    assert_identical_weights(resumed.model, whole.model)
    assert resumed.conflicts.state_dict() == whole.conflicts.state_dict()
    assert (tmp_path / "whole" / "gradient_conflicts.jsonl").read_text() == lines


def test_a_state_of_another_method_or_cut_short_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, mtl_method="pcgrad", **options).train()
    checkpoint = tmp_path / "checkpoint-3"
    with pytest.raises(ValueError, match="written with pcgrad, not famo"):
        trainer(tmp_path, mtl_method="famo", **options).train(resume_from_checkpoint=str(checkpoint))
    path = checkpoint / "mtl_state.pt"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="not a whole state file"):
        trainer(tmp_path, mtl_method="pcgrad", **options).train(resume_from_checkpoint=str(checkpoint))


def test_famo_hears_the_losses_after_the_step_with_the_same_dropout(tmp_path):
    """The replay of a step of size zero returns the first pass's losses, so the logits stay at zero."""
    run = trainer(
        tmp_path, model=TwoLayers(dropout=0.5, norm=True), mtl_method="famo", learning_rate=0.0, logging_steps=1
    )
    run.train()
    assert not bool(run.aggregator.logits.detach().any())
    moving = trainer(tmp_path, model=TwoLayers(dropout=0.5), mtl_method="famo", max_steps=4)
    moving.train()
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
    assert_identical_weights(with_second.model, without.model)
    for name, buffer in with_second.model.named_buffers():
        assert torch.equal(buffer, dict(without.model.named_buffers())[name]), name
