"""Tasks and labels that a batch, a window or a data set does not have."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from peft_ext.mtl.data.losses import count_labels, count_labels_by_id, count_labels_of_tasks, labels_of_tasks
from tests.mtl._models import TASKS, TwoLayers, assert_same_weights, in_pieces, samples, task_losses, trained, trainer


@pytest.mark.parametrize("logging_steps", [0, 1])
@pytest.mark.parametrize("unlabelled", [4, 16], ids=["micro-batch", "window"])
def test_samples_without_any_label_change_nothing(tmp_path, unlabelled, logging_steps):
    data = samples(missing=[(task, i) for task in range(3) for i in range(unlabelled)])
    whole, pieces = [in_pieces(tmp_path, n, data=data, conflict_logging_steps=logging_steps) for n in (1, 4)]
    assert_same_weights(pieces.model, whole.model)


def matrix_losses(outputs, labels, num_items_in_batch=None):
    columns = {task: labels[:, i] for i, task in enumerate(TASKS)}
    return {t: functional.cross_entropy(outputs[t], c) for t, c in columns.items() if bool(c.ne(-100).any())}


def as_matrix(data):
    return [{"x": s["x"], "labels": torch.stack([s[f"labels_{task}"] for task in TASKS])} for s in data]


def test_a_column_of_labels_per_task_counts_like_labels_of_its_own(tmp_path):
    data = samples(missing=[(1, i) for i in range(64) if i % 4 < 2 or i % 8 == 2])
    options = {"mtl_method": "famo"}
    expected = in_pieces(tmp_path, 4, data=data, **options)
    ours = in_pieces(tmp_path, 4, data=as_matrix(data), losses=matrix_losses, label_names=["labels"], **options)
    assert_same_weights(ours.model, expected.model)


@pytest.mark.parametrize("logging_steps", [0, 1])
@pytest.mark.parametrize("method", ["joint", "famo"])
def test_a_task_whose_loss_never_comes_is_absent(tmp_path, method, logging_steps):
    """Nothing says beforehand that it has no labels: `labels` is not laid out by task."""
    options = {"mtl_method": method, "conflict_logging_steps": logging_steps, "max_grad_norm": 0.0}

    def losses(outputs, labels, num_items_in_batch=None):
        return {t: functional.cross_entropy(outputs[t], labels[:, i]) for i, t in enumerate(TASKS) if t != "b"}

    data = [{**s, "labels": torch.cat([s["labels"], s["labels"][:1]])} for s in as_matrix(samples())]
    ours = in_pieces(tmp_path, 2, data=data, losses=losses, label_names=["labels"], **options)
    expected = in_pieces(tmp_path, 2, data=samples(missing=[(1, i) for i in range(64)]), **options)
    assert_same_weights(ours.model, expected.model)
    for a, b in zip(ours.state.log_history, expected.state.log_history, strict=True):
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=1e-5)
        assert "task_loss/b" not in a


def test_one_task_accumulates_exactly(tmp_path):
    data = [{"x": s["x"], "labels_a": s["labels_a"]} for s in samples(missing=[(0, i) for i in range(0, 64, 3)])]
    options = {"data": data, "label_names": ["labels_a"], "task_names": ["a"]}
    losses = lambda outputs, labels, num_items_in_batch=None: {"a": functional.cross_entropy(outputs["a"], labels)}  # noqa: E731
    whole, pieces = [in_pieces(tmp_path, n, model=TwoLayers(tasks=["a"]), losses=losses, **options) for n in (1, 4)]
    assert_same_weights(pieces.model, whole.model)


def test_labels_find_their_tasks_in_any_order():
    tasks = ["depth", "normal_depth"]
    for names in (["labels_depth", "labels_normal_depth"], ["labels_normal_depth", "labels_depth"]):
        assert labels_of_tasks(names, tasks) == ["labels_depth", "labels_normal_depth"]
    assert labels_of_tasks(["y1", "y2"], tasks) == ["y1", "y2"]
    assert labels_of_tasks(["labels_depth", "y"], ["other", "depth"]) == ["y", "labels_depth"]


@pytest.mark.parametrize("kind", [torch.long, torch.float32, torch.bfloat16], ids=str)
def test_missing_labels_are_not_counted_whatever_their_dtype(kind):
    nothing = -100 if kind is torch.long else float("nan")
    labels = torch.tensor([[1, -100], [0, nothing], [2, 4]], dtype=kind)
    assert count_labels(labels) == 4.0
    assert count_labels_of_tasks({"labels": labels}, ["labels"], ["a", "b"]).tolist() == [3.0, 1.0]
    ids = torch.tensor([0, 1, 0])
    assert count_labels_by_id({"labels": labels}, ["labels"], ids, 2).tolist() == [3.0, 1.0]
    with pytest.raises(ValueError, match=r"'labels' has shape \(3, 2\), not one row for each of 4 samples"):
        count_labels_by_id({"labels": labels}, ["labels"], torch.tensor([0, 1, 0, 1]), 2)


def test_labels_of_tokens_are_not_taken_for_those_of_tasks():
    batch = {"pixel_values": torch.zeros(5, 3), "input_ids": torch.zeros(4, 2), "labels": torch.zeros(4, 2)}
    assert count_labels_of_tasks(batch, ["labels"], ["a", "b"]) is None
    columns = {**batch, "input_ids": torch.zeros(4, 7)}
    assert count_labels_of_tasks(columns, ["labels"], ["a", "b"]).tolist() == [4.0, 4.0]
    assert count_labels_of_tasks({**batch, "labels": [{}] * 4}, ["labels"], ["a", "b"], 4).tolist() == [4.0, 4.0]
    with pytest.raises(ValueError, match="number of samples"):
        count_labels_of_tasks({**batch, "labels": [{}] * 4}, ["labels"], ["a", "b"])


def test_evaluation_with_a_batch_without_labels(tmp_path):
    held_out = samples(40, seed=7, missing=[(task, i) for task in range(3) for i in range(16)])
    metrics = trainer(tmp_path, eval_dataset=held_out).evaluate()
    full = trainer(tmp_path, eval_dataset=held_out[16:]).evaluate()
    for key in ("eval_loss", "eval_a_loss", "eval_b_loss"):
        assert metrics[key] == pytest.approx(full[key], abs=1e-6)


class Classifier(nn.Module):
    accepts_loss_kwargs = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(6, 3)

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("missing", [range(0, 48, 3), range(48)], ids=["some", "all"])
def test_missing_labels_where_samples_have_one_task(tmp_path, missing):
    def data(task, without):
        rows = samples(48, seed=task)
        absent = torch.tensor(-100)
        return [{"x": s["x"], "labels": absent if i in without else s["labels_a"]} for i, s in enumerate(rows)]

    def run(pieces):
        options = {"per_device_train_batch_size": 16 // pieces, "gradient_accumulation_steps": pieces}
        names = {"label_names": ["labels"], "task_names": None, "losses": None}
        given = {"one": data(1, ()), "two": data(2, missing)}
        return trained(tmp_path, Classifier(), given, mtl_method="pcgrad", **names, **options)

    whole, pieces = run(1), run(4)
    assert not whole.mtl_state.skipped_steps
    assert not pieces.mtl_state.skipped_steps
    assert_same_weights(pieces.model, whole.model)


def test_names_come_from_the_checkpoint(tmp_path):
    data = samples(missing=[(1, i) for i in range(48, 64)])
    options = {"task_names": None, "mtl_method": "famo", "save_strategy": "steps", "save_steps": 3}
    whole = in_pieces(tmp_path, 1, data=data, **options)
    again = in_pieces(tmp_path, 1, data=data, checkpoint=str(tmp_path / "checkpoint-3"), **options)
    assert_same_weights(again.model, whole.model, 0.0)


@pytest.mark.parametrize("kind", ["tuple", "tensor"])
def test_predictions_keep_everything_that_the_model_returns(tmp_path, kind):
    class Other(TwoLayers):
        def forward(self, x):
            outputs = tuple(super().forward(x).values())
            return outputs if kind == "tuple" else torch.stack(outputs, 1)

    def losses(outputs, labels, num_items_in_batch=None):
        parts = outputs if kind == "tuple" else outputs.unbind(1)
        return task_losses(dict(zip(TASKS, parts, strict=True)), labels)

    predictions = trainer(tmp_path, model=Other(), losses=losses).predict(samples(20)).predictions
    if kind == "tuple":
        assert [p.shape for p in predictions] == [(20, 3)] * 3
    else:
        assert predictions.shape == (20, 3, 3)
