"""
What gradients task by task cost: CPU time and memory of a training step of several tasks, against a step on the sum of
their losses.

    python examples/benchmarks/mtl.py                 # T = 2, 3 and 10, all weights and PSN 10 %
    python examples/benchmarks/mtl.py --tasks 3 --steps 10

Every configuration runs through `MTLTrainer`, once for time and once for memory, each in a process of its own. Time is
the process's CPU time, the fastest of the steps. Memory is the peak resident set over what the process held before the
first step, with glibc told to give freed blocks back at once: what it keeps otherwise varies by tens of MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
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
    """Train some steps in this process; milliseconds of CPU time and MiB."""
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

    with tempfile.TemporaryDirectory() as folder:
        config = MTLConfig(
            output_dir=folder,
            mtl_method=method,
            conflict_logging_steps=int(record),
            task_names=[str(task) for task in range(tasks)],
            label_names=[f"labels_{task}" for task in range(tasks)],
            max_steps=steps,
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
        data = Images(batch * steps, tasks)
        trainer = MTLTrainer(
            model=model, args=config, train_dataset=data, compute_task_losses_func=task_losses, callbacks=[Clock()]
        )
        trainer.train()
    passes = [(end[0] - start[0]) * 1000 for start, end in zip(marks[::2], marks[1::2], strict=True)]
    # The optimiser's state appears with the first step; it is the same for all methods and not counted.
    return {"ms": min(passes[1:]), "mib": marks[1][1] - marks[0][1], "trained": trained}


def run_alone(job: list[Any], settings: dict[str, str]) -> dict[str, float]:
    """`measure` in a new process with some environment variables."""
    command = [sys.executable, __file__, "--one", json.dumps(job)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{job}: {result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 3, 10], help="numbers of tasks")
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--steps", type=int, default=5, help="steps per configuration")
    parser.add_argument("--out", type=Path, help="write the measurements as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*json.loads(args.one))))
        return
    rows = []
    jobs = [(tasks, *configuration) for tasks in args.tasks for configuration in CONFIGURATIONS]
    for tasks, name, method, density, record in tqdm(jobs, desc="configurations"):
        timed = run_alone([method, density, record, tasks, args.batch, args.steps], {})
        weighed = run_alone([method, density, record, tasks, args.batch, 2], {"MALLOC_MMAP_THRESHOLD_": "131072"})
        rows.append({"tasks": tasks, "name": name, **timed, "mib": weighed["mib"]})
    print(f"{'T':>3} {'gradients':28}{'CPU ms':>10}{'of a sum':>10}{'MiB':>8}{'trained':>12}")
    for row in rows:
        base = next(
            r
            for r in rows
            if r["tasks"] == row["tasks"] and r["name"] == row["name"].replace("per task", "sum of losses")
        )
        print(
            f"{row['tasks']:>3} {row['name']:28}{row['ms']:>10.0f}{row['ms'] / base['ms']:>10.2f}{row['mib']:>8.0f}"
            f"{row['trained']:>12,}"
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps({"torch": torch.__version__, "batch": args.batch, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
