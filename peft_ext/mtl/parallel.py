"""Several processes: which set-ups gradients can be taken apart in, and how they are put together again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..sparse.bases.sharded import is_sharded
from .aggregators.base import Array


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def refuse_unsupported(trainer: Any) -> None:
    """
    Raise where per-task gradients would be wrong.

    Raises:
        `ValueError`: naming the set-up, the reason and what to use instead.
    """
    args = trainer.args
    kind = str(getattr(trainer.accelerator, "distributed_type", "")).rsplit(".", 1)[-1]
    remedy = "Use DistributedDataParallel (torchrun or accelerate launch) or FSDP2."
    if args.n_gpu > 1:
        raise ValueError(
            f"MTLTrainer sees {args.n_gpu} GPUs in one process and would use nn.DataParallel, which sums all tasks' "
            f"gradients before they can be told apart. {remedy} Or show it one GPU with CUDA_VISIBLE_DEVICES."
        )
    if getattr(trainer, "is_deepspeed_enabled", False) or kind == "DEEPSPEED":
        raise ValueError(
            "MTLTrainer does not work with DeepSpeed: its engine keeps gradients in buffers of its own, where one "
            f"task's cannot be told from another's. {remedy}"
        )
    if kind in ("MEGATRON_LM", "XLA"):
        raise ValueError(f"MTLTrainer does not work with {kind}: gradients are not in `param.grad`. {remedy}")
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            "MTLTrainer does not work with FSDP version 1, whose flat parameters mix shared ones with heads; set "
            "fsdp_version: 2."
        )
    if plugin is not None and args.noise_floor_steps:
        raise ValueError(
            f"noise_floor_steps={args.noise_floor_steps} does not work with FSDP2, whose processes must make the same "
            "passes, where some may lack half a task's batch. Set it to 0, or use DistributedDataParallel."
        )
    if any(kind in str(args.optim) for kind in ("lomo", "layerwise")):
        raise ValueError(
            f"optim={args.optim!r} updates parameters during the backward pass of the first task; use AdamW."
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and any(
        getattr(parallelism, f"{name}_size", 1) > 1 for name in ("tp", "cp", "sp", "dp_replicate")
    ):
        raise ValueError(f"MTLTrainer is not tested with tensor, context or hybrid parallelism. {remedy}")


@contextmanager
def task_backward(accelerator: Any, model: Any) -> Iterator[None]:
    """
    Forward and backward passes whose gradients stay one process's own (DDP), or are reduced into this process's shards
    right away (FSDP2, where unreduced gradients have no `.grad`).
    """
    with ExitStack() as stack:
        state = accelerator.gradient_state
        before = state.sync_gradients
        # transformers averages the parameters that FSDP2 does not manage in a hook that looks at this.
        state._set_sync_gradients(False)
        stack.callback(state._set_sync_gradients, before)
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(True)
        elif hasattr(model, "no_sync"):
            stack.enter_context(model.no_sync())
        yield


def processes() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum of a tensor over processes, in place."""
    if processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_process(flags: Tensor) -> Tensor:
    """Logical "or" of `flags` (bool) over all processes, on the device of `flags`."""
    if processes() == 1:
        return flags
    counts = flags.to(torch.int32)
    dist.all_reduce(counts)
    return counts > 0


def mean_of_processes(values: Array, device: torch.device) -> Array:
    """Mean of a float64 array over processes, sent from `device`."""
    total = sum_over_processes(torch.tensor(values, device=device, dtype=torch.float64))
    return (total / processes()).cpu().numpy()


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Average `.grad` over processes, also where some have none; FSDP2's shards are averaged already."""
    if processes() == 1:
        return
    parameters = [parameter for parameter in parameters if not is_sharded(parameter)]
    if not parameters:
        return
    found = torch.tensor([parameter.grad is not None for parameter in parameters], device=parameters[0].device)
    gradients = {}
    for index in torch.nonzero(any_process(found)).flatten().tolist():
        parameter = parameters[index]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients[index] = parameter.grad
    mean_over_processes(gradients)


def mean_over_processes(gradients: Mapping[int, Tensor]) -> None:
    """
    Average gradients over processes, in place, in few messages. Every process has the same keys in the same order.
    """
    count = processes()
    if count == 1 or not gradients:
        return
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for gradient in gradients.values():
        by_kind.setdefault((gradient.dtype, gradient.device), []).append(gradient)
    for group in by_kind.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in group])
        dist.all_reduce(flat)
        flat /= count
        for gradient, part in zip(group, flat.split([g.numel() for g in group]), strict=True):
            gradient.copy_(part.view_as(gradient))
