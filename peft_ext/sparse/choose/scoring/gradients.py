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
from transformers import PreTrainedModel

from ....preserve import preserved
from ...bases.neurons import base_model_of
from ...checks import check_flag
from ...config import SparseConfig
from .arguments import Classes, check_loss, check_scoring
from .batches import batches, forward, labels_of, loss_of
from .contrastive import SupervisedContrastiveLoss
from .experts import experts_grouped
from .features import Features, feature_reader
from .leaves import own_leaves
from .modules import rows_of, scored_modules


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
    offload: bool | str | os.PathLike[str] = False,
    progress: bool = True,
) -> dict[str, Tensor]:
    """
    Score every weight by the gradient of a loss over the data, for `selection="gradient"`.

    Paper: Zhang et al., [Gradient-based Parameter Selection for Efficient
    Fine-Tuning](https://arxiv.org/abs/2312.10136).

    Each weight's gradient is added to its sum as soon as the backward pass has made it, and then freed. Two dense
    gradients never exist at once. Afterwards the model (modes, `requires_grad`, gradients, buffers) and the random
    generators are as before, even after an error. In a distributed run every process scores its share of the data, and
    all processes get the sum.

    Args:
        model (`torch.nn.Module`):
            The model, on the device to compute on. It may have adapters already.
        dataloader (`Iterable`):
            Batches: mappings of the model's arguments with `labels`, or pairs of inputs and labels. With the
            contrastive loss, use a [`TwoViewCollator`] to give every sample a partner.
        loss (`Callable` or `"model"`, *optional*):
            A function of features and labels, by default `SupervisedContrastiveLoss(temperature=0.07)`. `"model"`
            takes the loss that the model itself returns for a batch with labels. It is the default for transformers'
            language models, whose labels are tokens.
        features (`str` or `Callable`, *optional*):
            The features that the loss is given: the output of the module of this name, or a function of the model's
            output, such as `lambda output: output.logits` for a cross-entropy. By default they are the input of the
            first linear layer of the model's head, at the token whose logits the model returns, or the `pooler_output`
            of a model without a head.
        config ([`SparseConfig`], *optional*):
            A config whose `target_modules` are scored. By default all layers with neurons, except the head.
        absolute (`bool`, *optional*, defaults to `False`):
            Whether to sum the magnitudes of the batches' gradients. By default signed gradients are summed, as in the
            published code, so that batches can cancel each other; entries are ranked by the magnitude of the sum.
        training (`bool`, *optional*, defaults to `False`):
            Whether to score in training mode, with dropout and drop path active, as the published code does.
        max_batches (`int`, *optional*):
            Number of batches to read; by default all.
        offload (`bool` or `str`, *optional*, defaults to `False`):
            Where to keep the sums, which are as large as the weights in float32: on the weights' device (`False`), in
            the CPU's memory (`True`), or in files in the folder of this name. On a CPU, `True` changes nothing and
            raises a warning.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `dict[str, torch.Tensor]`: Per module name, a float32 tensor in the shape of its weight.

    Raises:
        `ValueError`: If features or labels are missing, the loss is not finite, or every gradient is zero.
        `TypeError`: If a weight is quantised.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_ext import GPSConfig, gradient_scores

        >>> scores = gradient_scores(model, dataloader)
        >>> model = get_peft_model(model, GPSConfig(k=1).with_scores(scores))
        ```
    """
    check_scoring(model, dataloader, config, max_batches, progress)
    check_flag("absolute", absolute)
    check_flag("training", training)
    if not (features is None or isinstance(features, str) or callable(features)):
        raise ValueError(
            f"features={features!r} must be the name of a module, a function of the model's output, or None."
        )
    if not (loss is None or callable(loss) or (isinstance(loss, str) and loss == "model")):
        raise ValueError(f"loss={loss!r} must be a function of features and labels, or 'model', or None.")
    if loss is None and features is None and _is_language_model(model):
        loss = "model"
    by_model = isinstance(loss, str)
    compute: Loss = SupervisedContrastiveLoss() if loss is None or isinstance(loss, str) else loss
    classes = Classes() if isinstance(compute, SupervisedContrastiveLoss) and not by_model else None
    model = getattr(model, "_orig_mod", model)  # a compiled model passes over hooks
    modules = scored_modules(model, config)
    with (
        preserved(model, training),
        torch.enable_grad(),
        own_leaves(model, modules) as leaves,
        experts_grouped(modules),
    ):
        sums = _Sums(modules, leaves, absolute, offload)
        handles = sums.listen(model)
        try:
            with feature_reader(model, loss_of if by_model else features) as read:
                shown = batches(model, dataloader, max_batches, "gradient scores", progress)
                for number, batch in enumerate(shown):
                    found = read(forward(model, batch, with_labels=by_model))
                    value = check_loss(found if by_model else compute(found, labels_of(batch)), number, batch)
                    if classes is not None:
                        classes.add(labels_of(batch))
                    value.backward()
                    del found, value
            if classes is not None:
                classes.check(next(model.parameters()).device)
        finally:
            for handle in handles:
                handle.remove()
    return sums.finish()


def _is_language_model(model: nn.Module) -> bool:
    """Whether a model's output are tokens, so that its labels are no classes of samples."""
    base = base_model_of(model)
    base = getattr(base, "_orig_mod", base)
    return isinstance(base, PreTrainedModel) and base.get_output_embeddings() is not None


class _Sums:
    """fp32 sums of gradients, one per leaf of the scored modules (see [`own_leaves`])."""

    def __init__(
        self,
        modules: dict[str, Any],
        leaves: dict[str, nn.Parameter],
        absolute: bool,
        offload: bool | str | os.PathLike[str],
    ) -> None:
        self.modules = modules
        self.leaves = leaves
        self.weights = list({id(leaf): leaf for leaf in leaves.values()}.values())
        self.absolute = absolute
        self.offload = offload if type(offload) is bool else _folder(offload)
        self.totals: dict[int, Tensor] = {}  # by the leaf's id
        if offload is True and all(weight.device.type == "cpu" for weight in self.weights):
            warnings.warn(
                "offload=True keeps the sums of the gradients in the CPU's memory, where the weights are already, so "
                "it saves nothing here. Pass the name of a folder to keep them in files.",
                stacklevel=3,
            )

    def listen(self, model: nn.Module) -> list[Any]:
        """Let the scored weights alone require gradients, and take each as it comes."""
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for weight in self.weights:
            weight.requires_grad_(True)
        return [weight.register_post_accumulate_grad_hook(self.take) for weight in self.weights]

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
        unreached = [name for name in self.modules if id(self.leaves[name]) not in self.totals]
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
            name: rows_of(module, self.totals.get(id(leaf), nothing.expand(leaf.shape)))
            for name, module in self.modules.items()
            for leaf in [self.leaves[name]]
        }

    def _sum_over_processes(self) -> None:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        for weight in self.weights:
            # Every process takes part for every weight, whether or not its data reached it.
            total = self.totals.setdefault(id(weight), self.zeros(weight))
            summed = total.to(weight.device)
            dist.all_reduce(summed)
            total.copy_(summed)


def _folder(offload: Any) -> str:
    if not isinstance(offload, (str, os.PathLike)) or not os.path.isdir(offload):
        raise ValueError(
            f"offload={offload!r} is no folder; pass the name of an existing one, True for the CPU's memory, or False."
        )
    return os.fspath(offload)
