"""
What gradients task by task cost: CPU time and memory of a training step of several tasks, against a step on the sum of
their losses.

    python examples/benchmarks/mtl.py                 # T = 2, 3 and 10, all weights and PSN 10 %
    python examples/benchmarks/mtl.py --tasks 3 --steps 10

Every configuration runs through `MTLTrainer` in a process of its own, on one thread. Time is the process's CPU time
from the step's begin until the gradients are ready, the fastest of the steps. Memory is measured twice: `resident` is
the peak resident set of the first step over what the process held before it, with the allocator as it comes; `tensors`
is the peak of what torch's allocator had handed out during a later step, whatever the heap makes of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from _common.arguments import at_least, out_file, positive
from _common.memory import peak_bytes
from _common.runner import finish, parser_for, run_apart
from torch import nn
from tqdm import tqdm


CLASSES = 10
# (name, method, PSN density or None, record conflicts)
CONFIGURATIONS = [
    ("sum of losses", "joint", None, False),
    ("per task", "pcgrad", None, True),
    ("sum of losses, PSN 10 %", "joint", 0.1, False),
    ("per task, PSN 10 %", "pcgrad", 0.1, True),
]


class Images(torch.utils.data.Dataset):
    """Random images with a label per task."""

    def __init__(self, count: int, tasks: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(count, 3, 32, 32, generator=generator)
        self.labels = torch.randint(CLASSES, (count, tasks), generator=generator)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = {f"labels_{task}": label for task, label in enumerate(self.labels[index])}
        return {"pixel_values": self.pixels[index], **labels}


class ViT(nn.Module):
    """A vision transformer of 4.8 million weights over 65 tokens, with a linear head per task."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=8,
            image_size=32,
            patch_size=4,
        )
        torch.manual_seed(0)
        self.encoder = ViTModel(config, add_pooling_layer=False)
        self.heads = nn.ModuleDict({str(task): nn.Linear(256, CLASSES) for task in range(tasks)})

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        token = self.encoder(pixel_values=pixel_values).last_hidden_state[:, 0]
        return {task: head(token) for task, head in self.heads.items()}


def task_losses(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> dict[str, torch.Tensor]:
    return {task: nn.functional.cross_entropy(logits, labels[f"labels_{task}"]) for task, logits in outputs.items()}


def resident() -> float:
    """Peak resident set of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(method: str, density: float | None, record: bool, tasks: int, batch: int, steps: int) -> dict[str, float]:
    """Train some steps in this process, and a last one whose allocations are recorded; CPU milliseconds and MiB."""
    from transformers import TrainerCallback

    from peft_ext import PSNConfig
    from peft_ext.mtl import MTLConfig, MTLTrainer

    torch.set_num_threads(1)
    model: nn.Module = ViT(tasks)
    if density is not None:
        from peft import get_peft_model

        layers = [n for n, m in model.encoder.named_modules() if isinstance(m, nn.Linear)]
        targets = [f"encoder.{name}" for name in layers]
        heads = [f"heads.{task}" for task in range(tasks)]
        model = get_peft_model(model, PSNConfig(density=density, target_modules=targets, modules_to_save=heads))
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "heads" not in n)
    marks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            marks.append((time.process_time(), resident()))

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            marks.append((time.process_time(), resident()))

    peaks: list[int] = []

    class Weighed(MTLTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step < steps:
                return super().training_step(*args, **kwargs)
            losses: list[torch.Tensor] = []
            step = super().training_step
            peaks.append(peak_bytes(lambda: losses.append(step(*args, **kwargs)), torch.device("cpu")))
            return losses[0]

    with tempfile.TemporaryDirectory() as folder:
        config = MTLConfig(
            output_dir=folder,
            mtl_method=method,
            conflict_logging_steps=int(record),
            task_names=[str(task) for task in range(tasks)],
            label_names=[f"labels_{task}" for task in range(tasks)],
            max_steps=steps + 1,
            per_device_train_batch_size=batch,
            learning_rate=1e-4,
            use_cpu=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        data = Images(batch * (steps + 1), tasks)
        trainer = Weighed(
            model=model, args=config, train_dataset=data, compute_task_losses_func=task_losses, callbacks=[Clock()]
        )
        trainer.train()
    passes = [(end[0] - start[0]) * 1000 for start, end in zip(marks[::2], marks[1::2], strict=True)]
    # The optimiser's state appears with the first step; it is the same for all methods and not counted.
    return {
        "ms": min(passes[1:steps]),
        "resident_mib": marks[1][1] - marks[0][1],
        "tensors_mib": peaks[0] / 2**20,
        "trained": trained,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--tasks", type=at_least(2), nargs="+", default=[2, 3, 10], help="numbers of tasks")
    parser.add_argument("--batch", type=positive, default=16, help="images per step")
    parser.add_argument("--steps", type=at_least(2), default=5, help="steps per configuration")
    parser.add_argument("--out", type=out_file, help="write the measurements as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(*json.loads(args.one))))
        return
    rows: list[dict[str, Any]] = []
    jobs = [(tasks, *configuration) for tasks in args.tasks for configuration in CONFIGURATIONS]
    for tasks, name, method, density, record in tqdm(jobs, desc="configurations"):
        job = json.dumps([method, density, record, tasks, args.batch, args.steps])
        measured = run_apart(__file__, ["--one", job], threads=1)
        rows.append({"tasks": tasks, "name": name, **measured})
        base = name.replace("per task", "sum of losses")
        rows[-1]["of_a_sum"] = measured["ms"] / next(r["ms"] for r in rows if (r["tasks"], r["name"]) == (tasks, base))
    print(f"{'T':>3} {'gradients':28}{'CPU ms':>8}{'of a sum':>10}{'resident':>10}{'tensors':>9}{'trained':>12}")
    for row in rows:
        print(
            f"{row['tasks']:>3} {row['name']:28}{row['ms']:>8.0f}{row['of_a_sum']:>10.2f}{row['resident_mib']:>10.0f}"
            f"{row['tensors_mib']:>9.0f}{row['trained']:>12,}"
        )
    finish(args, {"batch": args.batch, "steps": args.steps, "rows": rows})


if __name__ == "__main__":
    main()
