"""Scores by the gradient of a loss over a task's data, with one weight's dense gradient alive at a time."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import SparseConfig
from .batches import Features, batches, feature_reader, forward, labels_of
from .contrastive import SupervisedContrastiveLoss
from .modules import parameter_of, rows_of, scored_modules
from .preserve import preserved


Loss = Callable[[Tensor, Tensor], Tensor]


def gradient_scores(
    model: nn.Module,
    dataloader: Iterable[Any],
    loss: Loss | Literal["model"] | None = None,
    *,
    features: Features = None,
    config: SparseConfig | None = None,
    absolute: bool = False,
    training: bool = False,
    max_batches: int | None = None,
    offload: bool | str = False,
    progress: bool = True,
) -> dict[str, Tensor]:
    """
    Score every weight by the gradient of a loss over the data, for `selection="gradient"` (thesis eqs. 4.1 and 4.2).

    Each weight's gradient is added to its sum as soon as the backward pass has made it, and freed: never are two dense
    gradients alive. Afterwards the model (modes, `requires_grad`, gradients, buffers) and the random generators are as
    before, also if something fails on the way. In a distributed run every process scores its share of the data and all
    get the sum.

    Args:
        model (`torch.nn.Module`): the model, on the device to compute on. It may have adapters already.
        dataloader (`Iterable`):
            Batches: mappings of the model's arguments, with `labels`, or pairs of inputs and labels. For the
            contrastive loss a [`TwoViewCollator`] gives every sample a partner.
        loss (`Callable` or `"model"`, *optional*):
            A function of features and labels, by default `SupervisedContrastiveLoss(temperature=0.07)`; or `"model"`
            for the loss that the model returns for a batch with labels.
        features (`str` or `Callable`, *optional*):
            What the loss is given: the output of the module of this name, or a function of the model's output, such as
            `lambda output: output.logits` with a cross-entropy. By default what enters the model's head, or its
            `pooler_output`.
        config ([`SparseConfig`], *optional*):
            Its `target_modules` are scored; by default all layers that have neurons, except for the head.
        absolute (`bool`, *optional*, defaults to `False`):
            Sum the magnitudes of the batches' gradients. As in the published code signed gradients are summed, so that
            batches can cancel, and the magnitude of the sum ranks.
        training (`bool`, *optional*, defaults to `False`):
            Score in training mode, as the published code does (dropout and drop path active).
        max_batches (`int`, *optional*): stop after so many.
        offload (`bool` or `str`, *optional*, defaults to `False`):
            Keep the sums in the CPU's memory, or in files in the folder of this name, instead of on the weights'
            device.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.

    Returns:
        `dict[str, torch.Tensor]`: per module name, fp32 in the shape of its weight.

    Raises:
        `ValueError`: if features or labels are missing, the loss is not finite, or every gradient is zero.
        `TypeError`: if a weight is quantised.
    """
    modules = scored_modules(model, config)
    sums = _Sums(modules, absolute, offload)
    compute: Loss = SupervisedContrastiveLoss() if loss is None or isinstance(loss, str) else loss
    by_model = isinstance(loss, str)
    if by_model and loss != "model":
        raise ValueError(f"loss={loss!r} must be a function of features and labels, or 'model'.")
    with preserved(model, training), torch.enable_grad():
        handles = sums.listen(model)
        try:
            with feature_reader(model, (lambda outputs: outputs.loss) if by_model else features) as read:
                shown = batches(model, dataloader, max_batches, "gradient scores", progress)
                for number, batch in enumerate(shown):
                    found = read(forward(model, batch, with_labels=by_model))
                    value = found if by_model else compute(found, labels_of(batch))
                    if not bool(torch.isfinite(value)):
                        raise ValueError(f"The loss of batch {number} is {value.item()}, so no entries can be ranked.")
                    value.backward()
                    del found, value
        finally:
            for handle in handles:
                handle.remove()
    return sums.finish()


class _Sums:
    """fp32 sums of gradients, one per weight; a weight that several modules share has one."""

    def __init__(self, modules: dict[str, Any], absolute: bool, offload: bool | str) -> None:
        self.modules = modules
        self.weights = {id(weight): weight for weight in map(parameter_of, modules.values())}
        self.absolute = absolute
        self.offload = offload
        self.totals: dict[int, Tensor] = {}  # by the weight's id
        if isinstance(offload, str) and not os.path.isdir(offload):
            raise ValueError(f"offload={offload!r} is no folder; pass an existing one, or True for the CPU's memory.")

    def listen(self, model: nn.Module) -> list[Any]:
        """Let the scored weights alone require gradients, and take each as it comes."""
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for weight in self.weights.values():
            weight.requires_grad_(True)
        return [weight.register_post_accumulate_grad_hook(self.take) for weight in self.weights.values()]

    @torch.no_grad()
    def take(self, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        if self.absolute:
            gradient = gradient.abs_()  # in place: nobody else has it
        total = self.totals.get(id(weight))
        if total is None:
            total = self.totals[id(weight)] = self.zeros(weight)
        total.add_(gradient.to(total.device))  # into fp32, whatever the gradient is

    def zeros(self, weight: Tensor) -> Tensor:
        if not isinstance(self.offload, str):
            return torch.zeros(weight.shape, device="cpu" if self.offload else weight.device)
        descriptor, path = tempfile.mkstemp(dir=self.offload, prefix="gradient_scores_")
        os.close(descriptor)
        total = torch.from_numpy(np.memmap(path, dtype=np.float32, mode="w+", shape=tuple(weight.shape)))
        with suppress(OSError):
            os.remove(path)  # the mapping keeps the file's content as long as the tensor lives
        return total

    def finish(self) -> dict[str, Tensor]:
        self._sum_over_processes()
        unreached = [name for name, module in self.modules.items() if id(parameter_of(module)) not in self.totals]
        if not any(bool(total.any()) for total in self.totals.values()):
            raise ValueError(
                "Every gradient is zero. With the contrastive loss, some samples of a batch must share a label: use "
                "larger batches, or a TwoViewCollator."
            )
        if unreached:
            warnings.warn(
                f"The loss has no gradient for {len(unreached)} layers, such as '{unreached[0]}': their entries will "
                "be the first ones. Exclude these layers, or pass `features` or a `loss` that depends on them.",
                stacklevel=3,
            )
        nothing = torch.zeros(())
        return {
            name: rows_of(module, self.totals.get(id(parameter), nothing.expand(parameter.shape)))
            for name, module in self.modules.items()
            for parameter in [parameter_of(module)]
        }

    def _sum_over_processes(self) -> None:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        for weight in self.weights.values():
            # Every process takes part for every weight, whether or not its data reached it.
            total = self.totals.setdefault(id(weight), self.zeros(weight))
            summed = total.to(weight.device)
            dist.all_reduce(summed)
            total.copy_(summed)
