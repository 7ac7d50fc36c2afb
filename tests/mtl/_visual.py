"""Samples with several images, or none, in the layouts of their models, and what each gives by itself."""

import os

import pytest
import torch

from peft_ext.mtl import MTLConfig, MTLTrainer
from tests._models.vision_language import IMAGE, PAD, VIDEO, build
from tests.mtl._models import QUIET


START, END = 58, 59
TASKS = ["a", "b"]
IMAGES = (2, 0, 1, 1, 0, 2)
MODELS = {"llava": "llava", "qwen": "qwen2_vl", "video": "qwen2_vl", "packed": "llama"}


def samples(layout, count=3, tasks=(0, 1, 0, 1, 0, 1)):
    """The task of each under `task_ids`; sample 0 has two images, sample 1 none."""
    generator = torch.Generator().manual_seed(count)
    made = []
    for number, images in enumerate(IMAGES[:count]):
        words = torch.randint(3, 50, (4 + 3 * number,), generator=generator).tolist()
        sample = {"task_ids": tasks[number]}
        if layout == "packed":
            sample["input_ids"] = words
        elif layout == "llava":
            sample["pixels"] = torch.randn(images, 3, 16, 16, generator=generator)
            sample["input_ids"] = [IMAGE] * 16 * images + words
        else:
            mark, frames = (IMAGE, 1) if layout == "qwen" else (VIDEO, 2)  # four tokens of 16 patches per frame
            sample["pixels"] = torch.randn(images * frames * 16, 96, generator=generator)
            sample["grid"] = torch.tensor([[frames, 4, 4]]).repeat(images, 1)
            sample["input_ids"] = [START, *[mark] * 4 * frames, END] * images + words
        made.append(sample)
    return made


def bare(row):
    """A sample without its task."""
    return {key: value for key, value in row.items() if key != "task_ids"}


def collate(rows):
    """As these models' processors do: images, patches and videos one after another, whichever sample they are of."""
    assert all("task_ids" not in row for row in rows)
    if "pixels" not in rows[0]:
        return pack(rows)
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [PAD] * (longest - len(row["input_ids"])) for row in rows])
    video = any(VIDEO in row["input_ids"] for row in rows)
    pixels = torch.cat([row["pixels"] for row in rows])
    batch = {"pixel_values_videos" if video else "pixel_values": pixels} if len(pixels) else {}
    batch |= {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    batch["labels"] = ids.masked_fill(ids == PAD, -100).masked_fill((ids == IMAGE) | (ids == VIDEO), -100)
    if "grid" in rows[0]:
        batch["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        if len(pixels):
            batch["video_grid_thw" if video else "image_grid_thw"] = torch.cat([row["grid"] for row in rows])
    return batch


def pack(rows):
    """One row of all samples, told apart by their positions."""
    ids = torch.cat([torch.tensor(row["input_ids"]) for row in rows])
    positions = torch.cat([torch.arange(len(row["input_ids"])) for row in rows])
    return {
        "input_ids": ids[None],
        "labels": ids.masked_fill(positions == 0, -100)[None],
        "position_ids": positions[None],
    }


def one_by_one(model, rows, collate=collate):
    """Loss and gradients of each task: of every sample by itself, then the mean over labels."""
    losses, gradients, labels = {}, {}, {}
    for row in rows:
        task = row["task_ids"]
        batch = collate([bare(row)])
        count = int(batch["labels"][:, 1:].ne(-100).sum())
        model.zero_grad()
        loss = model(**batch).loss * count
        loss.backward()
        labels[task] = labels.get(task, 0) + count
        losses[task] = losses.get(task, 0.0) + float(loss.detach())
        own = gradients.setdefault(task, {})
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                own[name] = own.get(name, 0.0) + parameter.grad.clone()
    model.zero_grad()
    return (
        {task: loss / labels[task] for task, loss in losses.items()},
        {task: {name: g / labels[task] for name, g in own.items()} for task, own in gradients.items()},
    )


def assert_same(found, layout, rows, evaluated=None, model=None, collate=collate):
    """Losses and gradients are those of the samples run one by one."""
    model = build(MODELS[layout]) if model is None else model
    losses, gradients = one_by_one(model, rows, collate)
    assert found["losses"] == pytest.approx(losses, abs=1e-5)
    expected = losses if evaluated is None else one_by_one(model, evaluated, collate)[0]
    assert found["evaluation"] == pytest.approx(expected, abs=1e-5)
    for task, own in gradients.items():
        for name, gradient in own.items():
            torch.testing.assert_close(found["gradients"][task][name], gradient, rtol=1e-4, atol=2e-6, msg=name)


class Watching:
    """Keeps every task's gradients of the last step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        combine = self.gradient_step.combine

        def watched(*args):
            store, compute = self.mtl_state.gradients, self.mtl_state.gradients.gramian

            def gramian():
                rows = [{store.names[i]: g.clone() for i, g in row.items()} for row in store.rows]
                self.rows = {task: row for task, row in enumerate(rows) if row}
                return compute()

            store.gramian = gramian
            combined = combine(*args)
            store.gramian = compute
            return combined

        self.gradient_step.combine = watched


class Watched(Watching, MTLTrainer):
    arguments = MTLConfig


def make(folder, layout, rows, model=None, kind=Watched, collator=collate, evaluated=None, **options):
    """A trainer of one step of size zero."""
    given = {name: options.pop(name) for name in ("compute_task_losses_func", "processing_class") if name in options}
    defaults = {
        **QUIET,
        "label_names": ["labels"],
        "per_device_train_batch_size": len(rows) if hasattr(rows, "__len__") else 1,
        "task_sampling": "proportional",
        "max_steps": 1,
        "learning_rate": 0.0,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "remove_unused_columns": False,
        "task_names": TASKS,
        "optim": "sgd",
    }
    return kind(
        model=model if model is not None else build(MODELS[layout]),
        args=kind.arguments(output_dir=str(folder), **{**defaults, **options}),
        train_dataset=rows,
        eval_dataset=evaluated if evaluated is not None else rows,
        data_collator=collator,
        **given,
    )


def results(run):
    """The tasks' losses and gradients of the first step, then those of an evaluation."""
    run.train()
    metrics = run.evaluate()
    return {
        "losses": {i: run.state.log_history[0].get(f"task_loss/{task}") for i, task in enumerate(TASKS)},
        "gradients": run.rows,
        "evaluation": {i: metrics[f"eval_{task}_loss"] for i, task in enumerate(TASKS)},
    }


def train(folder, case):
    """What six samples give in one step, in one process or several."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    layout, batch = case.pop("layout"), case.pop("batch")
    rows = samples(layout, 6)
    options = {"ddp_backend": "gloo", "ddp_find_unused_parameters": True} if processes > 1 else {}
    run = make(
        folder,
        layout,
        rows,
        evaluated=rows[:5],
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=len(rows) // batch // processes,
        **options,
        **case,
    )
    return results(run)
