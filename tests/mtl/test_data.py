"""Samples of one task each: how they are drawn, and training on them."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from peft_ext.mtl.data.datasets import SAMPLINGS, TaskSampler, concatenate_tasks, task_ids_of
from tests.mtl._models import assert_same_weights, trained


def ids_of(sizes):
    return torch.tensor([task for task, size in enumerate(sizes) for _ in range(size)])


def drawn(sizes, sampling, batch_size=4, epoch=0, **options):
    ids = ids_of(sizes)
    sampler = TaskSampler(ids, len(sizes), sampling, batch_size, **options)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert len(order) == len(sampler) == sum(sizes)
    return torch.tensor(order), ids[order]


@pytest.mark.parametrize("sizes", [(10, 10), (30, 6, 12), (5, 100)], ids=str)
def test_shares_of_the_tasks(sizes):
    order, tasks = drawn(sizes, "proportional")
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    order, tasks = drawn(sizes, "mixed")
    counts = torch.bincount(tasks, minlength=len(sizes))
    assert int(counts.max() - counts.min()) <= 1
    for batch in tasks.split(len(sizes)):  # any batch of that size has every task
        assert len(batch) < len(sizes) or len(batch.unique()) == len(sizes)
    for sampling in ("homogeneous", "round_robin"):
        order, tasks = drawn(sizes, sampling, batch_size=2, processes=3)
        blocks = tasks.split(6)
        assert all(len(block.unique()) == 1 for block in blocks)
        for start in range(0, len(blocks) - len(sizes) + 1, len(sizes)):
            assert len({int(block[0]) for block in blocks[start : start + len(sizes)]}) == len(sizes)
    order, tasks = drawn(sizes, "round_robin", batch_size=2)
    assert [int(block[0]) for block in tasks.split(2)] == [i % len(sizes) for i in range(-(-len(tasks) // 2))]


def test_temperature_runs_from_proportional_to_even():
    share = [
        float((drawn((4000, 1000), "temperature", temperature=t)[1] == 1).float().mean()) for t in (1.0, 2.0, 1e6)
    ]
    assert share == pytest.approx([0.2, 1 / 3, 0.5], abs=0.03)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_small_tasks_are_gone_through_before_they_repeat(sampling):
    order, tasks = drawn((40, 8), sampling)
    small = order[tasks == 1].tolist()
    if sampling != "temperature":
        assert set(small[:8]) == set(range(40, 48))
    assert order.tolist() != drawn((40, 8), sampling, epoch=1)[0].tolist()
    assert order.tolist() == drawn((40, 8), sampling)[0].tolist()


class Numbers(torch.utils.data.Dataset):
    """Regression with its own rule per task."""

    def __init__(self, task, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, 6, generator=generator)
        self.y = self.x @ torch.randn(6, 1, generator=torch.Generator().manual_seed(task))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "labels": self.y[index]}


class Regression(nn.Module):
    accepts_loss_kwargs = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": functional.mse_loss(logits, labels), "logits": logits}


def run(folder, data=None, model=None, **options):
    data = data if data is not None else {"one": Numbers(1, 48, 1), "two": Numbers(2, 48, 2)}
    options = {"label_names": ["labels"], "task_names": None, "max_grad_norm": 0.0, "losses": None, **options}
    return trained(folder, model or Regression(), data, **options)


@pytest.mark.parametrize("method", ["joint", "pcgrad", "famo"])
def test_a_mixed_batch_is_the_same_in_pieces(tmp_path, method):
    whole = run(tmp_path, mtl_method=method)
    pieces = run(tmp_path, mtl_method=method, per_device_train_batch_size=2, gradient_accumulation_steps=8)
    assert_same_weights(pieces.model, whole.model, 1e-6)
    assert pieces.state.log_history[0]["task_loss/one"] == pytest.approx(
        whole.state.log_history[0]["task_loss/one"], abs=1e-5
    )


def test_uneven_pieces_count_by_their_samples(tmp_path):
    """Proportional draws give micro-batches other shares of the tasks than the window has."""
    data = {"one": Numbers(1, 60, 1), "two": Numbers(2, 36, 2)}
    options = {"mtl_method": "cagrad", "task_sampling": "proportional"}
    whole = run(tmp_path, data, **options)
    pieces = run(tmp_path, data, per_device_train_batch_size=2, gradient_accumulation_steps=8, **options)
    assert_same_weights(pieces.model, whole.model, 2e-6)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_sampling_trains(tmp_path, sampling):
    result = run(tmp_path, task_sampling=sampling, mtl_method="pcgrad", gradient_accumulation_steps=2, max_steps=30)
    losses = [entry["loss"] for entry in result.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert len(result.conflicts.steps) == 30


def test_resuming_in_the_middle_of_an_epoch_draws_the_same(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 9, "mtl_method": "pcgrad"}
    whole = run(tmp_path, **options)
    again = run(tmp_path, checkpoint=str(tmp_path / "checkpoint-4"), **options)
    assert_same_weights(again.model, whole.model, 0.0)


def test_evaluation_by_task_from_a_dict_or_a_column(tmp_path):
    held_out = {"one": Numbers(1, 20, 5), "two": Numbers(2, 12, 6)}
    by_dict = run(tmp_path, eval_dataset=held_out).evaluate()
    by_column = run(tmp_path, eval_dataset=concatenate_tasks(held_out, "task_ids")).evaluate()
    for task in held_out:
        assert by_column[f"eval_{task}_loss"] == pytest.approx(by_dict[f"eval_{task}_loss"], abs=1e-5)


def test_a_column_of_a_hub_data_set_is_enough(tmp_path, tiny):
    datasets = pytest.importorskip("datasets")
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(3, 60, (6,), generator=generator).tolist(), "labels": i % 3, "task_ids": i % 2}
        for i in range(32)
    ]
    data = datasets.Dataset.from_list(rows)
    model: AutoModelForSequenceClassification = tiny("bert")
    options = {"label_names": None, "task_names": ["even", "odd"], "mtl_method": "pcgrad", "max_steps": 3}
    result = run(tmp_path, data, model, **options)
    assert "task_loss/odd" in result.state.log_history[0]
    assert len(result.conflicts.steps) == 3


def test_task_numbers_may_be_labels_of_one_pass(tmp_path):
    """One forward pass over a mixed batch, with losses told apart by task, is the batch taken apart."""

    class Plain(Regression):
        def forward(self, x, labels=None):
            return super().forward(x, labels) if labels is not None else self.net(x)

    def losses(outputs, labels, num_items_in_batch=None):
        error = (outputs - labels["labels"]).square().squeeze(1)
        found = {"one": error[labels["task_ids"] == 0], "two": error[labels["task_ids"] == 1]}
        return {task: part.mean() for task, part in found.items() if len(part)}

    def train(names, function):
        options = {"mtl_method": "cagrad", "task_sampling": "mixed", "noise_floor_steps": 2}
        sizes = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2}
        result = run(tmp_path, model=Plain(), label_names=names, losses=function, **options, **sizes)
        lines = (tmp_path / "gradient_conflicts.jsonl").read_text().splitlines()
        return result.model, [json.loads(line)["noise_cos"] for line in lines if "noise_cos" in line]

    (in_one, noise), (apart, noise_apart) = train(["labels", "task_ids"], losses), train(["labels"], None)
    assert_same_weights(in_one, apart, 1e-6)
    assert len(noise) == 3
    for found, expected in zip(noise, noise_apart, strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="add 'task_ids' to label_names"):
        train(["labels"], losses)


def test_a_list_of_samples_with_task_numbers_is_enough(tmp_path):
    data = [{**Numbers(i % 2, 48, i % 2)[i], "task_ids": i % 2} for i in range(48)]
    assert run(tmp_path, data, mtl_method="pcgrad").task_names == ["0", "1"]


def test_mistakes_are_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_list([{"x": [0.0] * 6, "labels": [0.0], "task_ids": 0}]).to_iterable_dataset()
    with pytest.raises(ValueError, match="has a column 'task_ids' but no length"):
        run(tmp_path, stream)
    with pytest.raises(ValueError, match="train_sampling_strategy='group_by_length' has no effect"):
        run(tmp_path, train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match="A step of 1 samples cannot have every one of 2 tasks"):
        run(tmp_path, per_device_train_batch_size=1, mtl_method="pcgrad")
    with pytest.raises(ValueError, match=r"train_dataset\['two'\] is empty"):
        concatenate_tasks({"one": Numbers(1, 3, 1), "two": Numbers(2, 0, 1)}, "task_ids")
    with pytest.raises(ValueError, match=r"train_dataset\['one'\] has no length"):
        concatenate_tasks({"one": iter([])}, "task_ids")
    with pytest.raises(ValueError, match="task 1 of 2 has no samples"):
        TaskSampler(torch.zeros(4, dtype=torch.long), 2, "mixed", 2)
    with pytest.raises(ValueError, match="differ from the training sets' names"):
        run(tmp_path, task_names=["x", "y"])
    with pytest.raises(ValueError, match="set gradient_accumulation_steps to a multiple of 2, not 1"):
        run(tmp_path, task_sampling="homogeneous", mtl_method="pcgrad")
    assert task_ids_of([{"x": 1}], "task_ids") is None
