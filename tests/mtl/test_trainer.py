"""The trainer against a plain one, and against itself with the same batch in other pieces."""

import itertools

import pytest
import torch
from torch.nn import functional
from transformers import HfArgumentParser, TrainingArguments

from peft_ext.mtl import MTLConfig, MTLTrainer, aggregate
from peft_ext.mtl.aggregators import OWN_METHODS
from tests.mtl._models import (
    LABELS,
    TASKS,
    TwoLayers,
    WithMeanLoss,
    WithTaskLosses,
    assert_identical,
    assert_same_weights,
    config,
    in_pieces,
    jacobian,
    plain_trainer,
    samples,
    task_losses,
    trained,
    trainer,
    weights,
)


@pytest.mark.parametrize("logging_steps", [0, 1, 4])
@pytest.mark.parametrize("pieces", [1, 4])
def test_joint_is_the_plain_trainer(tmp_path, pieces, logging_steps):
    options = {"per_device_train_batch_size": 16 // pieces, "gradient_accumulation_steps": pieces}
    reference = plain_trainer(tmp_path, WithMeanLoss(), **options)
    reference.train()
    ours = trained(tmp_path, conflict_logging_steps=logging_steps, **options)
    assert_same_weights(ours.model, reference.model)
    for a, b in zip(ours.state.log_history, reference.state.log_history, strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "train_loss"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-6), key


@pytest.mark.parametrize("dropped", [(), [(1, i) for i in range(0, 60, 3)]], ids=["all-labels", "some-missing"])
@pytest.mark.parametrize("method", OWN_METHODS)
def test_sixteen_at_once_are_four_times_four(tmp_path, method, dropped):
    whole, pieces = [in_pieces(tmp_path, n, data=samples(missing=dropped), mtl_method=method) for n in (1, 4)]
    # The order of additions differs; GradDrop may then keep another sign where a probability is near its draw.
    assert_same_weights(pieces.model, whole.model, 2e-6 if method != "graddrop" else 1e-4)


@pytest.mark.parametrize("reduction", ["mean", "reference"])
@pytest.mark.parametrize("method", OWN_METHODS)
def test_written_gradients_are_those_of_the_dense_jacobian(tmp_path, method, reduction):
    """One SGD step against autograd and `aggregate` on the whole Jacobian; heads keep their own gradients."""
    model = TwoLayers()
    data = samples(16)
    batch = {key: torch.stack([sample[key] for sample in data]) for key in data[0]}
    before = weights(model)
    losses = task_losses(model(batch["x"]), {name: batch[name] for name in LABELS})
    rows = jacobian([losses[task] for task in TASKS], list(model.trunk.parameters()))
    heads = {task: torch.autograd.grad(losses[task], model.heads[task].weight, retain_graph=True)[0] for task in TASKS}
    run = trainer(
        tmp_path,
        model=model,
        data=data,
        mtl_method=method,
        gradient_reduction=reduction,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        seed=5,
    )
    run.train()
    values = [float(losses[task]) for task in TASKS]
    extra = {"losses": values} if method == "famo" else {}
    direction = aggregate(rows, method=method, reduction=reduction, seed=5, **extra)
    step = torch.cat([(before[f"trunk.{n}"] - p).flatten() for n, p in run.model.trunk.named_parameters()])
    torch.testing.assert_close(step.detach(), direction, rtol=1e-4, atol=2e-6)
    share = {"mean": 1 / 3, "reference": 1.0}[reduction]
    for index, task in enumerate(TASKS):
        weight = share
        if method == "famo":
            weight = (1 / values[index]) / sum(1 / v for v in values)
        if method == "nash_mtl":
            unclipped = aggregate(rows.double(), method=method, max_norm=0.0)
            # The weights are what the unclipped direction is made of.
            weight = float(torch.linalg.lstsq(rows.double().T, unclipped).solution[index])
        moved = before[f"heads.{task}.weight"] - run.model.heads[task].weight
        torch.testing.assert_close(moved.detach(), weight * heads[task], rtol=1e-4, atol=2e-6)


def test_absent_tasks_and_zero_gradients_are_left_out(tmp_path):
    missing = [(2, i) for i in range(64)]
    without = trained(tmp_path / "a", data=samples(missing=missing), mtl_method="pcgrad")
    two = [{k: v for k, v in s.items() if k != "labels_c"} for s in samples()]
    only = trainer(
        tmp_path / "b",
        data=two,
        losses=lambda outputs, labels, num_items_in_batch=None: {
            task: functional.cross_entropy(outputs[task], labels[f"labels_{task}"]) for task in ("a", "b")
        },
        mtl_method="pcgrad",
        label_names=LABELS[:2],
        task_names=TASKS[:2],
    )
    only.train()
    assert_same_weights(without.model, only.model, 1e-7)
    assert all(torch.tensor(without.conflicts.cosines)[:, 1:].isnan().flatten())
    assert without.conflicts.incidence() == only.conflicts.incidence()


def test_shared_parameters_can_be_named(tmp_path):
    first_layer = trained(tmp_path / "a", mtl_method="pcgrad", shared_parameters=r"^trunk\.0\.")
    assert sum(first_layer.mtl_state.gradients.shared) == 2
    with pytest.raises(ValueError, match="shared_parameters='nowhere'"):
        trained(tmp_path / "b", mtl_method="pcgrad", shared_parameters="nowhere")


def test_the_model_may_return_the_losses(tmp_path):
    expected = trained(tmp_path, mtl_method="cagrad")
    ours = trained(tmp_path, model=WithTaskLosses(), losses=None, mtl_method="cagrad")
    assert_identical(ours.model, expected.model)


def test_names_are_learnt_from_the_first_losses_without_a_trace(tmp_path):
    expected = trained(tmp_path, model=TwoLayers(dropout=0.3, norm=True), mtl_method="mgda")
    ours = trained(tmp_path, model=TwoLayers(dropout=0.3, norm=True), mtl_method="mgda", task_names=None)
    assert ours.task_names == TASKS
    assert_identical(ours.model, expected.model)


def test_losses_may_be_sums_over_the_window(tmp_path):
    def sums(outputs, labels, num_items_in_batch):
        return {
            task: functional.cross_entropy(outputs[task], labels[f"labels_{task}"], reduction="sum")
            / num_items_in_batch[task]
            for task in TASKS
        }

    data = samples(missing=[(0, i) for i in range(0, 40, 2)])
    options = {
        "data": data,
        "mtl_method": "imtl_g",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
    }
    expected = trained(tmp_path, **options)
    ours = trained(tmp_path, losses=sums, task_loss_scale="window", **options)
    assert_same_weights(ours.model, expected.model)


def test_evaluation_reports_every_task(tmp_path):
    held_out = samples(40, seed=7, missing=[(1, i) for i in range(0, 40, 4)])
    run = trained(tmp_path, eval_dataset=held_out, mtl_method="pcgrad")
    metrics = run.evaluate()
    batch = {key: torch.stack([sample[key] for sample in held_out]) for key in held_out[0]}
    with torch.no_grad():
        expected = task_losses(run.model(batch["x"]), {name: batch[name] for name in LABELS})
    for task in TASKS:
        assert metrics[f"eval_{task}_loss"] == pytest.approx(float(expected[task]), abs=1e-5)


def test_logs_have_every_tasks_loss_and_only_numbers(tmp_path):
    run = trained(tmp_path, mtl_method="cagrad", conflict_granularity="layer", noise_floor_steps=2)
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    for entry in logs:
        assert all(isinstance(value, (int, float)) for value in entry.values())
        mean = sum(entry[f"task_loss/{task}"] for task in TASKS) / 3
        assert entry["loss"] == pytest.approx(mean, abs=1e-5)
        assert {f"task_weight/{task}" for task in TASKS} <= set(entry)
        assert "gradient_conflict/layer/trunk.0" in entry
        assert 0 <= entry["gradient_conflict/noise_floor"] <= 100
    last = run.state.log_history[-1]
    assert last["gradient_conflict_incidence_all"] == run.conflicts.incidence()


@pytest.mark.parametrize("method", ["pcgrad", "joint"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_values_skip_the_step_and_touch_nothing(tmp_path, method, where, caplog):
    states = []

    def losses(outputs, labels, num_items_in_batch=None):
        found = task_losses(outputs, labels)
        if len(states) == 2:
            bad = torch.tensor(float("inf"))
            found["b"] = found["b"] * bad if where == "loss" else found["b"] + 0 * (outputs["b"].sum() * bad).sqrt()
        states.append((weights(run.model), run.aggregator.state_dict()["generator"]))
        return found

    record = {"conflict_logging_steps": int(method != "joint")}  # joint training is then one backward pass
    run = trainer(tmp_path, losses=losses, mtl_method=method, learning_rate=0.1, weight_decay=0.1, **record)
    run.train()
    states.append((weights(run.model), run.aggregator.state_dict()["generator"]))
    same = [all(torch.equal(a[0][n], b[0][n]) for n in a[0]) for a, b in itertools.pairwise(states)]
    assert same == [False, False, True, False, False, False]
    assert torch.equal(states[3][1], states[2][1])
    assert method == "joint" or not torch.equal(states[4][1], states[3][1])
    assert "is skipped" in caplog.text
    assert run.state.log_history[-1]["skipped_steps"] == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant):
    class Checkpointed(TwoLayers):
        def forward(self, x):
            x = x.requires_grad_()  # re-entrant checkpointing needs it
            features = torch.utils.checkpoint.checkpoint(self.trunk, x, use_reentrant=reentrant)
            return {task: head(features) for task, head in self.heads.items()}

    expected = trained(tmp_path, mtl_method="pcgrad")
    ours = trained(tmp_path, model=Checkpointed(), mtl_method="pcgrad")
    assert_same_weights(ours.model, expected.model, 1e-7)


@pytest.mark.parametrize("method", ["joint", "pcgrad"])
def test_compiling_changes_nothing(tmp_path, method):
    donated = torch._functorch.config.donated_buffer
    expected = trained(tmp_path, mtl_method=method)
    ours = trained(tmp_path, mtl_method=method, torch_compile=True, torch_compile_backend="aot_eager")
    assert_same_weights(ours.model, expected.model)
    assert ours.mtl_state.gradients.shared == expected.mtl_state.gradients.shared
    assert torch._functorch.config.donated_buffer == donated  # other models compile as they did before


def test_bf16_autocast_trains(tmp_path):
    run = trained(tmp_path, mtl_method="cagrad", bf16=True)
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="args must be an MTLConfig"):
        MTLTrainer(model=TwoLayers(), args=TrainingArguments(str(tmp_path)), train_dataset=samples())
    with pytest.raises(ValueError, match="No losses per task"):
        trainer(
            tmp_path, losses=None, model=type("M", (TwoLayers,), {"forward": lambda self, x, **k: {"z": x}})()
        ).train()
    with pytest.raises(ValueError, match="must be a scalar tensor"):
        trained(tmp_path, losses=lambda outputs, labels, num_items_in_batch=None: dict(outputs))
    with pytest.raises(ValueError, match="loss for 'd'"):
        bad = lambda outputs, labels, num_items_in_batch=None: {"d": outputs["a"].sum()}  # noqa: E731
        trained(tmp_path, losses=bad)
    for field, value in (
        ("mtl_method", "best"),
        ("mtl_method_kwargs", "{"),
        ("task_sampling", "x"),
        ("task_names", ["a", "a"]),
        ("shared_parameters", "("),
        ("sampling_temperature", 0),
        ("conflict_logging_steps", -1),
    ):
        with pytest.raises(ValueError, match=field):
            config(tmp_path, **{field: value})


def test_options_come_from_a_command_line(tmp_path):
    arguments = ["--mtl_method", "cagrad", "--mtl_method_kwargs", '{"c": 0.5}', "--task_names", "a", "b"]
    (parsed,) = HfArgumentParser(MTLConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path), *arguments])
    assert parsed.mtl_method_kwargs == {"c": 0.5}
    assert parsed.task_names == ["a", "b"]
    assert MTLConfig(**parsed.to_dict()).mtl_method == "cagrad"
