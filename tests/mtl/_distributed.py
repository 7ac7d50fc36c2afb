"""Trainings in one or several processes; run by `tests._processes.results_of`."""

import gc
import json
import os
import sys

import torch

import peft_ext.mtl.trainer  # noqa: F401 - before the first `gc.freeze`


def train(folder, options):
    """
    The weights after a training, its cosines, and whether the weights were sharded; or what `_visual` or `_sft` has.
    """
    if "layout" in options:
        from tests.mtl._visual import train as train_visual

        return train_visual(folder, options)
    if options.pop("sft", False):
        from tests.mtl._sft import train as train_texts

        return train_texts(folder, options)
    from tests.mtl._models import TwoLayers, samples, trainer

    shard = options.pop("shard", False)
    split = options.pop("split", False)
    method = options.pop("mtl_method")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [(1, i) for i in range(64) if i % 8 < 4] if options.pop("missing", False) else []
    common = {
        "mtl_method": method,
        "per_device_train_batch_size": 8 // processes,
        "per_device_eval_batch_size": 4 // processes,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "sequential",
        "optim": "sgd" if shard else "adamw_torch",
        "max_grad_norm": 0.0,
        "max_steps": 4,
        **({"ddp_backend": "gloo"} if processes > 1 else {}),
        **options,
    }
    if split:
        from peft_ext.mtl import MTLTrainer
        from peft_ext.mtl.data.datasets import concatenate_tasks
        from tests.mtl._models import config
        from tests.mtl.test_data import Numbers, Regression

        data = {"one": Numbers(1, 64, 1), "two": Numbers(2, 64, 2)}
        common |= {"task_names": None, "label_names": ["labels"]}
        del common["train_sampling_strategy"]
        held_out = concatenate_tasks({"one": Numbers(1, 5, 5), "two": Numbers(2, 6, 6)}, "task_ids")
        run = MTLTrainer(model=Regression(), args=config(folder, **common), train_dataset=data, eval_dataset=held_out)
    else:
        held_out = samples(11, seed=7, missing=[(1, i) for i in range(4, 10)])
        run = trainer(folder, model=TwoLayers(), data=samples(missing=missing), eval_dataset=held_out, **common)
    if shard and processes > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # As accelerate's FSDP2 plug-in does, which insists on an accelerator.
        mesh = init_device_mesh("cpu", (processes,))
        if split:  # inside, every forward pass gathers
            fully_shard(run.model.net, mesh=mesh)
        fully_shard(run.model, mesh=mesh)
        run.accelerator.prepare_model = lambda model, **kwargs: model
        run._save_optimizer_and_scheduler = lambda folder: None
    run.train()
    weights = {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in run.accelerator.unwrap_model(run.model).named_parameters()
    }
    cosines = torch.tensor([c.tolist() for c in run.conflicts.cosines], dtype=torch.float64)
    sharded = any(hasattr(p, "to_local") for p in run.model.parameters())
    metrics = run.evaluate()
    return {
        "weights": weights,
        "cosines": cosines,
        "evaluation": {task: metrics[f"eval_{task}_loss"] for task in run.task_names},
        "sharded": sharded,
    }


def main(folder, cases):
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group("gloo")
    results = []
    for case in cases:
        gc.freeze()  # as in the tests' conftest
        try:
            results.append(train(folder, dict(case)))
        except ValueError as error:
            results.append({"error": str(error)})
    torch.save(results, os.path.join(folder, f"result{os.environ.get('RANK', '0')}.pt"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
