"""Batches by task: samples are grouped before they are collated, so that rows need not be samples."""

import json
import logging

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import default_data_collator

from peft_ext.mtl.conflicts.recorder import pair_cosines
from peft_ext.mtl.data.collation import PARTS, SOURCE, TaskCollator, batch_size_of, parts_of
from peft_ext.mtl.data.datasets import TaskDataset
from tests._models.vision_language import build
from tests.mtl._models import assert_identical
from tests.mtl._visual import TASKS, Watched, assert_same, bare, collate, make, one_by_one, results, samples


@pytest.mark.parametrize(
    ("layout", "tasks"),
    [("llava", (0, 1, 0)), ("llava", (0, 0, 1)), ("qwen", (0, 0, 1)), ("video", (0, 1, 1)), ("packed", (0, 1, 0))],
    ids=str,
)
def test_each_task_trains_on_its_own_samples(tmp_path, layout, tasks):
    rows = samples(layout, tasks=tasks)
    assert_same(results(make(tmp_path, layout, rows)), layout, rows)


def test_pieces_and_workers_change_nothing(tmp_path):
    rows = samples("llava", 6)
    run = make(
        tmp_path,
        "llava",
        rows,
        evaluated=rows[:5],
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=3,
        dataloader_num_workers=1,
    )
    assert_same(results(run), "llava", rows, rows[:5])


def cosine(halves, pick):
    """Between the gradients of two halves of some samples, computed one by one."""
    model = build("llava")
    shapes = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    found = [{**shapes, **one_by_one(model, half)[1][pick]} for half in halves]
    rows = torch.stack([torch.cat([row[name].flatten() for name in shapes]) for row in found]).double()
    return pair_cosines((rows @ rows.T).numpy())[0]


def noise_of(folder):
    return json.loads((folder / "gradient_conflicts.jsonl").read_text().splitlines()[0])["noise_cos"]


class Noisy:
    """A collator that draws random numbers, from torch's stream and from its own."""

    generator = None

    def __call__(self, rows):
        self.generator = self.generator or torch.Generator().manual_seed(0)
        batch = collate(rows)
        if "pixel_values" in batch:
            noise = torch.randn(1) + torch.randn(1, generator=self.generator)
            batch["pixel_values"] = batch["pixel_values"] + 0.1 * noise
        return batch


def test_the_noise_floor_halves_samples(tmp_path):
    rows = samples("llava", 6)
    run = make(tmp_path, "llava", rows, noise_floor_steps=1, task_sampling="mixed")
    run.train()
    drawn = [rows[i] for i in run._get_train_sampler()]
    own = [[row for row in drawn if row["task_ids"] == task] for task in range(2)]
    expected = [cosine((part[::2], part[1::2]), task) for task, part in enumerate(own)]
    assert noise_of(tmp_path) == pytest.approx(expected, abs=1e-4)


def untasked(count):
    return [bare(row) for row in samples("llava", count)]


def two_losses(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return {"a": functional.cross_entropy(logits, labels), "b": 2.0 * functional.cross_entropy(logits, labels)}


def test_the_noise_floor_halves_samples_with_several_labels(tmp_path):
    rows = untasked(4)
    options = {"noise_floor_steps": 1, "train_sampling_strategy": "sequential"}
    make(tmp_path, "llava", rows, compute_task_losses_func=two_losses, **options).train()
    tagged = [{**row, "task_ids": 0} for row in rows]
    assert noise_of(tmp_path) == pytest.approx([cosine((tagged[::2], tagged[1::2]), 0)] * 2, abs=1e-4)


def test_measuring_the_noise_floor_changes_no_bit_of_the_training(tmp_path):
    def trained(floor):
        options = {"noise_floor_steps": floor, "max_steps": 2, "learning_rate": 0.05}
        run = make(tmp_path, "llava", samples("llava", 4), collator=Noisy(), **options)
        run.train()
        return run.model

    assert_identical(trained(1), trained(0))


class OwnLoader(Watched):
    """Overrides the data loader, as users may; `collator` is what it collates with."""

    rows_per_batch = 3

    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=self.rows_per_batch, collate_fn=self.collator)


def without_tasks(rows):
    return collate([bare(row) for row in rows])


def with_tasks(rows):
    return {**without_tasks(rows), "task_ids": torch.tensor([row["task_ids"] for row in rows])}


def test_a_batch_that_came_collated_is_refused_unless_it_has_one_task(tmp_path):
    def loaded(collator, rows_per_batch=3, **options):
        run = make(tmp_path, "llava", samples("llava"), kind=OwnLoader, **options)
        run.collator, run.rows_per_batch = collator or run.task_collator(), rows_per_batch
        return run

    with pytest.raises(
        ValueError, match=r"tasks \[0, 1\] came collated.*'pixel_values' \(3, 3, 16, 16\).*label_names"
    ):
        loaded(with_tasks).train()
    with pytest.raises(ValueError, match=r"'pixel_values' \(3, 3, 16, 16\).*does not say its samples' tasks"):
        loaded(without_tasks).train()
    single = loaded(with_tasks, rows_per_batch=1, gradient_accumulation_steps=3)
    for run in (single, loaded(None)):
        assert_same(results(run), "llava", samples("llava"))
    with pytest.raises(ValueError, match="noise_floor_steps=1 collates the halves"):
        loaded(with_tasks, rows_per_batch=1, noise_floor_steps=1).train()


def test_batches_that_accelerate_would_cut_are_refused(tmp_path):
    options = {"accelerator_config": {"dispatch_batches": True}}
    with pytest.raises(ValueError, match="Set accelerator_config={'dispatch_batches': False}"):
        make(tmp_path, "llava", samples("llava"), **options).train()

    class Stream(torch.utils.data.IterableDataset):
        def __init__(self, rows):
            self.rows = rows

        def __iter__(self):
            return iter(self.rows)

    with pytest.raises(ValueError, match="or give a map-style data set"):
        make(tmp_path, "llava", samples("llava"), evaluated=Stream(samples("llava"))).evaluate()
    given = {"compute_task_losses_func": two_losses, "per_device_train_batch_size": 1}
    with pytest.raises(
        ValueError, match=r"'pixel_values' has shape \(2, 3, 16, 16\), not a row for each of 1 samples"
    ):
        make(tmp_path, "llava", Stream(untasked(3)), **given).train()


def test_tokens_are_counted_over_all_parts_and_the_collator_stays_the_users(tmp_path, caplog):
    rows = samples("llava")
    options = {"include_num_input_tokens_seen": "non_padding"}
    run = make(tmp_path, "llava", rows, **options)
    assert run.data_collator is collate
    run.train()
    assert run.data_collator is collate
    assert run.state.num_input_tokens_seen == sum(len(row["input_ids"]) for row in rows)
    assert run.state.total_flos > 0
    assert "Could not estimate" not in caplog.text


def test_evaluation_takes_no_unlabelled_part_and_no_unknown_task(tmp_path):
    rows = samples("llava", 4)
    rows[3] = {**rows[3], "input_ids": rows[3]["input_ids"][:16]}  # the image alone: no label
    run = make(tmp_path, "llava", rows[:3], evaluated=rows, per_device_eval_batch_size=2)
    losses = one_by_one(build("llava"), rows[:3])[0]
    metrics = run.evaluate()
    assert [metrics[f"eval_{task}_loss"] for task in TASKS] == pytest.approx([losses[0], losses[1]], abs=1e-5)
    for number in (-1, 2, 0.5):
        with pytest.raises(ValueError, match=f"task_ids={number} is not the number of a task: they are 0 to 1"):
            run.evaluate([{**rows[0], "task_ids": number}])
    with pytest.raises(ValueError, match="1 of the 2 samples of a batch have no 'task_ids'"):
        run.evaluate([rows[1], bare(rows[0])])


class Doubled(Watched):
    def compute_loss(self, *args, **kwargs):
        result = super().compute_loss(*args, **kwargs)
        return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result


@pytest.mark.parametrize("size", [1, 3])
def test_evaluation_uses_a_loss_that_a_subclass_computes(tmp_path, size):
    rows = samples("llava")
    losses = one_by_one(build("llava"), rows)[0]
    metrics = make(tmp_path, "llava", rows, kind=Doubled, per_device_eval_batch_size=size).evaluate()
    assert [metrics[f"eval_{task}_loss"] for task in TASKS] == pytest.approx([2 * losses[0], 2 * losses[1]], abs=1e-5)


def test_the_number_of_samples_is_known_or_refused():
    assert batch_size_of({"x": torch.zeros(3, 2), "y": torch.zeros(3), "flag": True}) == 3
    with pytest.raises(ValueError, match=r"'pixel_values' \(2, 3\), 'input_ids' \(3, 2\) cannot be told"):
        batch_size_of({"pixel_values": torch.zeros(2, 3), "input_ids": torch.zeros(3, 2)})
    rows = [{"x": torch.zeros(2), "task": i} for i in (1, 0, 1)]
    batch = TaskCollator(default_data_collator, "task", 2)(rows)
    assert {task: len(part["x"]) for task, part in batch[PARTS].items()} == {0: 1, 1: 2}
    assert (batch[SOURCE].size, batch[SOURCE].tasks) == (3, [1, 0, 1])
    assert parts_of({"x": torch.zeros(2), "task": torch.tensor([1, 1])}, "task", 2).keys() == {1}


def test_joined_data_sets_count_from_both_ends():
    data = TaskDataset([[{"x": i} for i in range(5)], [{"x": 10 + i} for i in range(100)]], "task")
    assert data[-1] == data[104] == {"x": 109, "task": 1}
    assert data[-105] == {"x": 0, "task": 0}
    with pytest.raises(IndexError):
        data[105]
    with pytest.raises(ValueError, match="has 'x' already"):
        TaskDataset(data.datasets, "x")[0]


def test_labels_that_belong_to_no_task_are_announced(tmp_path, caplog):
    def run(**options):
        options = {"per_device_train_batch_size": 2, **options}
        return make(tmp_path, "llava", untasked(4), compute_task_losses_func=two_losses, **options)

    with caplog.at_level(logging.WARNING):
        run(gradient_accumulation_steps=2, max_steps=2).train()
    assert caplog.text.count("micro-batches are weighted by their number of samples") == 1
    with pytest.raises(ValueError, match="cannot be counted, as task_loss_scale='window' needs"):
        run(task_loss_scale="window").train()
