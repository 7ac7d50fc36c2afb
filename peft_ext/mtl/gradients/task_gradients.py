"""The tasks' gradients of one optimiser step: collected task by task, put together, written back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...sparse.bases.sharded import is_sharded
from ..aggregators import Aggregator, Step
from ..aggregators.base import Array
from ..parallel import any_process, average_gradients, local, mean_over_processes, processes, sum_over_processes
from .gramian import gramian_of, layer_of


@dataclass
class Combined:
    """
    What a method makes of the tasks' gradients: their `weights` `[tasks]` for shared parameters, or, of methods
    without, the `direction` of each shared parameter by its number; and their weights for `heads`, `[tasks]`.
    """

    weights: Array | None
    heads: Array
    direction: dict[int, Tensor]


class TaskGradients:
    """
    The gradients of every task, of the trainable parameters that it reached.

    Memory: one copy of the trainable parameters per task that reaches them, in `dtype`. For sparse adapters those are
    the values alone.

    Args:
        parameters (`dict[str, nn.Parameter]`): the trainable ones, by name.
        num_tasks (`int`): number of tasks.
        shared (`str`, *optional*): regular expression of the names of shared parameters.
        heads (`set[str]`, *optional*): names that are never shared, however many tasks reach them.
        dtype (`torch.dtype`): in which gradients are kept.
        by_layer (`bool`): whether to compute a Gramian per layer too.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        num_tasks: int,
        shared: str | None = None,
        heads: set[str] | None = None,
        dtype: torch.dtype = torch.float32,
        by_layer: bool = False,
    ) -> None:
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        self.num_tasks = num_tasks
        self.dtype = dtype
        self.by_layer = by_layer
        self.device = self.parameters[0].device if self.parameters else torch.device("cpu")
        self.heads = heads or set()
        self.shared = [False] * len(self.names)
        self.fixed = shared is not None
        if shared is not None:
            self.shared = [re.search(shared, name) is not None for name in self.names]
            if not any(self.shared):
                raise ValueError(
                    f"shared_parameters={shared!r} is found in no trainable parameter; their names are like "
                    f"{', '.join(self.names[:3])}."
                )
        self.reached = torch.zeros(num_tasks, len(self.names), dtype=torch.bool)  # ever, by each task
        self.rows: list[dict[int, Tensor]] = []
        self.clear()

    @classmethod
    def of_model(
        cls,
        model: nn.Module,
        num_tasks: int,
        shared: str | None = None,
        dtype: torch.dtype = torch.float32,
        by_layer: bool = False,
    ) -> TaskGradients:
        """For the trainable parameters of a model, of which `modules_to_save` are never shared."""
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        heads = {name for name in parameters if ".modules_to_save." in name}
        return cls(parameters, num_tasks, shared, heads, dtype, by_layer)

    def clear(self) -> None:
        """Forget the gradients, to begin an optimiser step."""
        self.rows = [{} for _ in range(self.num_tasks)]

    def collect(self, task: int, is_stand_in: bool = False) -> None:
        """
        Move the gradients that one task's backward pass left in `.grad` to its row, adding to what is there. After a
        pass that only stands in for a task that another process has, nothing but FSDP2's shards is worth keeping.
        """
        row = self.rows[task]
        kept = {
            index
            for index, parameter in enumerate(self.parameters)
            if parameter.grad is not None and (is_sharded(parameter) or not is_stand_in)
        }
        room = self._room_for(sorted(kept - set(row)))
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            gradient = local(parameter.grad.detach())
            parameter.grad = None
            if index in room:
                row[index] = room[index].copy_(gradient)
            elif index in kept:
                row[index] += gradient

    def _room_for(self, indices: list[int]) -> dict[int, Tensor]:
        """
        Places for gradients, in one block per device. Where backward passes leave them, they lie between freed
        temporaries and split the heap into pieces too small for the next pass: ten tasks of half a million values took
        206 to 250 MiB over the step's begin, and 166 to 169 in blocks, of which 19 are the rows.
        """
        by_device: dict[torch.device, dict[int, torch.Size]] = {}
        for index in indices:
            part = local(self.parameters[index].detach())
            by_device.setdefault(part.device, {})[index] = part.shape
        room: dict[int, Tensor] = {}
        for device, shapes in by_device.items():
            sizes = [shape.numel() for shape in shapes.values()]
            pieces = torch.empty(sum(sizes), dtype=self.dtype, device=device).split(sizes)
            room |= {index: piece.view(shapes[index]) for index, piece in zip(shapes, pieces, strict=True)}
        return room

    def reduce(self, factor: float = 1.0) -> None:
        """Average over processes, and multiply by `factor`. FSDP2 has averaged its shards already."""
        reached = torch.zeros_like(self.reached)
        for task, row in enumerate(self.rows):
            reached[task, list(row)] = True
        reached = any_process(reached.to(self.device)).cpu()
        self._note_reached(reached)
        for task, row in enumerate(self.rows):
            plain: dict[int, Tensor] = {}
            for index in torch.nonzero(reached[task]).flatten().tolist():
                if index not in row:  # another process's batch had this task
                    row[index] = torch.zeros_like(local(self.parameters[index].detach()), dtype=self.dtype)
                if not is_sharded(self.parameters[index]):
                    plain[index] = row[index]
            mean_over_processes(plain)
            for gradient in row.values() if factor != 1.0 else ():
                gradient *= factor
        if not self.fixed:
            by_several = (self.reached.sum(dim=0) > 1).tolist()
            self.shared = [new and name not in self.heads for name, new in zip(self.names, by_several, strict=True)]

    def _note_reached(self, reached: Tensor) -> None:
        """A gradient of zeros reaches nothing: compiled graphs have one for the heads of all other tasks."""
        new = reached & ~self.reached
        pairs = [(task, index) for task, index in torch.nonzero(new).tolist() if index in self.rows[task]]
        flags = torch.zeros_like(self.reached)
        if pairs:
            found = torch.stack([self.rows[task][index].any().to(self.device) for task, index in pairs])
            flags[tuple(torch.tensor(pairs).T)] = found.cpu()
        self.reached |= any_process(flags.to(self.device)).cpu() if bool(new.any()) else flags

    def gramian(self) -> tuple[Array, dict[str, Array]]:
        """Inner products over the shared parameters, float64 `[tasks, tasks]`, and per layer if asked for."""
        layers: dict[str, Tensor] = {}
        has_shards = any(is_sharded(parameter) for parameter in self.parameters)
        for index, name in enumerate(self.names):
            if self.shared[index]:
                part = gramian_of([row.get(index) for row in self.rows]).to(self.device)
                if has_shards and not is_sharded(self.parameters[index]):
                    part /= processes()  # every process has the whole gradient
                layer = layer_of(name) if self.by_layer else ""
                layers[layer] = layers[layer] + part if layer in layers else part
        if not layers:
            return np.zeros((self.num_tasks, self.num_tasks)), {}
        total = torch.stack(list(layers.values()))  # [layers, tasks, tasks]
        if has_shards:
            sum_over_processes(total)
        total = total.cpu()
        by_layer = {name: total[i].numpy() for i, name in enumerate(layers)} if self.by_layer else {}
        return total.sum(dim=0).numpy(), by_layer

    def heads_are_finite(self) -> bool:
        """Whether the gradients of parameters of single tasks are finite, in every process."""
        bad = torch.zeros(1, dtype=torch.bool, device=self.device)
        for row in self.rows:
            for index, gradient in row.items():
                if not self.shared[index]:
                    bad |= ~gradient.isfinite().all().to(self.device)
        return not bool(any_process(bad))

    def combine(self, aggregator: Aggregator, step: Step) -> Combined:
        """Let a method decide on the step's gradients. If it needs whole rows, these are used up."""
        weights = None if aggregator.needs_rows else aggregator.weights(step)
        heads = aggregator.head_weights(step, weights)
        return Combined(weights, heads, self._direction(aggregator, step) if weights is None else {})

    def write(self, combined: Combined, factor: float = 1.0) -> None:
        """Put `factor` times the combined gradients into `.grad`, and forget those of the tasks."""
        for index, part in combined.direction.items():
            self._put(index, part * factor)
        for index, shared in enumerate(self.shared):
            weights = combined.weights if shared else combined.heads
            if weights is not None:
                self._put(index, self._combined(index, weights * factor))
        self.clear()

    def _combined(self, index: int, weights: Array) -> Tensor | None:
        total: Tensor | None = None
        for task, row in enumerate(self.rows):
            gradient = row.pop(index, None)  # freed as soon as it is used
            if gradient is None:
                continue
            if total is None:
                total = gradient.mul_(float(weights[task]))
            else:
                total.add_(gradient, alpha=float(weights[task]))
        return total

    def _direction(self, aggregator: Aggregator, step: Step) -> dict[int, Tensor]:
        """The combined gradient of each shared parameter, by a method that works on whole rows."""
        indices = [i for i, shared in enumerate(self.shared) if shared and any(i in row for row in self.rows)]
        if any(is_sharded(self.parameters[i]) for i in indices):
            raise ValueError(
                f"{type(aggregator).__name__} needs whole gradients, of which FSDP2 gives each process a part. Use "
                "DistributedDataParallel, or a method that works on inner products, such as 'pcgrad' or 'cagrad'."
            )
        active = step.active
        if not len(active):
            return {}
        sizes = [self.parameters[i].numel() for i in indices]
        dtype = torch.promote_types(self.dtype, torch.float32)
        rows = torch.zeros(len(active), sum(sizes), dtype=dtype, device=self.device)
        for row, task in zip(rows, active, strict=True):
            for index, part in zip(indices, row.split(sizes), strict=True):
                gradient = self.rows[task].pop(index, None)
                if gradient is not None:
                    part.copy_(gradient.reshape(-1))
        parts = aggregator.combine(rows, step).split(sizes)
        return {i: part.view_as(self.parameters[i]) for i, part in zip(indices, parts, strict=True)}

    def _put(self, index: int, gradient: Tensor | None) -> None:
        parameter = self.parameters[index]
        if gradient is None:
            return
        gradient = gradient.to(parameter.dtype)
        if is_sharded(parameter):
            from torch.distributed.tensor import DTensor

            gradient = DTensor.from_local(
                gradient,
                parameter.device_mesh,  # type: ignore[attr-defined]
                parameter.placements,  # type: ignore[attr-defined]
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        parameter.grad = gradient

    def average_sum(self, factor: float) -> None:
        """Average over processes what one backward pass for all tasks left in `.grad`, and multiply by `factor`."""
        average_gradients(self.parameters)
        for parameter in self.parameters if factor != 1.0 else ():
            if parameter.grad is not None:
                parameter.grad *= factor

    def sum_is_finite(self) -> bool:
        """Whether `.grad` is finite in every process; if not, there is none afterwards."""
        found = [parameter for parameter in self.parameters if parameter.grad is not None]
        finite = [local(parameter.grad).isfinite().all() for parameter in found if parameter.grad is not None]
        if not finite or not bool(any_process(~torch.stack(finite).all())):
            return True
        for parameter in found:
            parameter.grad = None
        return False

    def put_infinity(self) -> None:
        """Make a gradient scaler skip the step."""
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, float("inf"))

    def state_dict(self) -> dict[str, Any]:
        """Parameters that each task has reached so far."""
        return {"names": self.names, "reached": self.reached.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`, by the parameters' names."""
        position = {name: i for i, name in enumerate(state["names"])}
        for index, name in enumerate(self.names):
            if name in position:
                self.reached[:, index] = state["reached"][:, position[name]]
