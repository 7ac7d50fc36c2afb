"""A small network with one head per task, its data, and trainers for it."""

import torch
from torch import nn
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from peft_ext.mtl import MTLConfig, MTLTrainer


TASKS = ["a", "b", "c"]


class TwoLayers(nn.Module):
    """A shared trunk and a head per task; `dropout` and `norm` make it depend on random numbers and buffers."""

    def __init__(self, dropout=0.0, norm=False, tasks=TASKS):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(
            nn.Linear(6, 16),
            nn.BatchNorm1d(16) if norm else nn.Identity(),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(16, 8),
            nn.Tanh(),
        )
        self.heads = nn.ModuleDict({task: nn.Linear(8, 3) for task in tasks})

    def forward(self, x):
        features = self.trunk(x)
        return {task: head(features) for task, head in self.heads.items()}


class WithMeanLoss(TwoLayers):
    """Returns the mean of the tasks' losses, as any Trainer expects."""

    accepts_loss_kwargs = False

    def forward(self, x, labels_a, labels_b, labels_c):
        logits = super().forward(x)
        labels = {"a": labels_a, "b": labels_b, "c": labels_c}
        losses = [functional.cross_entropy(logits[task], labels[task]) for task in TASKS]
        return {"loss": torch.stack(losses).mean(), **logits}


class WithTaskLosses(TwoLayers):
    """Returns the losses per task itself."""

    def forward(self, x, labels_a, labels_b, labels_c):
        return {
            "task_losses": task_losses(
                super().forward(x), {"labels_a": labels_a, "labels_b": labels_b, "labels_c": labels_c}
            )
        }


LABELS = ["labels_a", "labels_b", "labels_c"]


def task_losses(outputs, labels, num_items_in_batch=None):
    return {
        task: functional.cross_entropy(outputs[task], labels[f"labels_{task}"])
        for task in outputs
        if bool(labels[f"labels_{task}"].ne(-100).any())
    }


def samples(count=64, seed=1, missing=()):
    """Inputs with a label per task; `missing` lists (task, sample) without one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    labels = torch.randint(3, (count, 3), generator=generator)
    for task, sample in missing:
        labels[sample, task] = -100
    return [{"x": x[i], **{name: labels[i, t] for t, name in enumerate(LABELS)}} for i in range(count)]


QUIET = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False}


def config(folder, **options):
    defaults = {
        **QUIET,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "max_steps": 6,
        "learning_rate": 0.05,
        "logging_steps": 2,
        "label_names": LABELS,
        "task_names": TASKS,
    }
    return MTLConfig(output_dir=str(folder), **{**defaults, **options})


def trainer(folder, model=None, data=None, losses=task_losses, **options):
    keys = ("eval_dataset", "aggregator", "callbacks", "optimizers", "compute_metrics")
    given = {key: options.pop(key) for key in keys if key in options}
    return MTLTrainer(
        model=model if model is not None else TwoLayers(),
        args=config(folder, **options),
        train_dataset=data if data is not None else samples(),
        compute_task_losses_func=losses,
        **given,
    )


def trained(folder, *args, checkpoint=None, **options):
    run = trainer(folder, *args, **options)
    run.train(resume_from_checkpoint=checkpoint)
    return run


def in_pieces(folder, pieces, **options):
    """Trained on batches of 16 samples, in so many micro-batches."""
    sizes = {"per_device_train_batch_size": 16 // pieces, "gradient_accumulation_steps": pieces}
    return trained(folder, train_sampling_strategy="sequential", **sizes, **options)


def plain_trainer(folder, model, callbacks=(), **options):
    fields = config(folder, **options).to_dict()
    known = {key: value for key, value in fields.items() if key in TrainingArguments.__dataclass_fields__}
    return Trainer(model=model, args=TrainingArguments(**known), train_dataset=samples(), callbacks=list(callbacks))


def jacobian(losses, parameters):
    """A row of gradients per loss."""
    found = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([gradient.flatten() for gradient in row]) for row in found])


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(actual, expected, tolerance=1e-6):
    for name, weight in weights(expected).items():
        difference = (dict(actual.named_parameters())[name] - weight).abs().max()
        assert difference <= tolerance, (name, float(difference))


def assert_identical(actual, expected):
    """Weights and buffers are, bit for bit."""
    state = actual.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name
