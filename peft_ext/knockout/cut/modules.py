"""Module knockout: set the output of a layer's attention or MLP at some positions to zero."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..model.architecture import bind, inspect_model
from ..model.masks import repeat_rows, span_of_call
from ..model.position import PromptPosition
from ..model.threads import own_thread
from .attention import zero_output
from .edges import GENERATED, check_mask, extend, is_last
from .scope import KnockoutScope


MODULES = ("attention", "mlp")


class ModuleKnockout(KnockoutScope):
    """
    Context manager that removes the output of modules. Inside it, the attention or the MLP of the given layers adds
    nothing to the residual stream at the given positions.

    Several knockouts can be active at once, with [`AttentionKnockout`] too. On exit, also after an exception, the
    model is as it was. Only calls of the thread that entered the context are affected, so run the model in that
    thread.

    Args:
        model (`torch.nn.Module`):
            A decoder of transformers, with or without a vision tower or PEFT adapters.
        layers (`Sequence[int]`):
            Layer numbers, counted from 0; negative numbers count from the end.
        positions (`torch.Tensor`):
            Bool mask `[batch, sequence]` over the prompt. A mask of one row serves any batch.
        module (`str`, *optional*, defaults to `"attention"`):
            `"attention"` or `"mlp"`.
        generated (`str`, *optional*, defaults to `"follow"`):
            As in [`AttentionKnockout`].
        answer_tokens (`int`, *optional*, defaults to 0):
            As in [`AttentionKnockout`].

    Raises:
        `ValueError`: If the model lacks a part or an argument is malformed, before anything is changed. During the
            forward pass, if the positions do not fit its inputs.

    Warns:
        `UserWarning`: On exit, if none of the layers was called.

    Example:

        ```py
        >>> with ModuleKnockout(model, [4, 5], groups["last"], module="mlp"):
        ...     logits = model(**inputs).logits
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] | int,
        positions: Tensor,
        module: str = "attention",
        generated: str = "follow",
        answer_tokens: int = 0,
    ) -> None:
        if module not in MODULES:
            raise ValueError(f'module is {module!r}: must be "attention" or "mlp".')
        if generated not in GENERATED:
            raise ValueError(f'generated is {generated!r}: must be "follow" or "fixed".')
        self.architecture = inspect_model(model)
        self.layers = self.architecture.check_layers(layers)
        part_of = self.architecture.attention if module == "attention" else self.architecture.mlp
        self.targets = {index: part_of(index) for index in self.layers}
        self.positions = check_mask(positions, "positions")
        self.follows = generated == "follow" and is_last(positions)
        self.position = PromptPosition(positions.shape[1], self.architecture.virtual_tokens, answer_tokens)
        self._rows: dict[int, Tensor] = {}

    def _forget(self) -> None:
        self._rows = {}

    def _put_hooks(self, stack: ExitStack) -> None:
        for index, target in self.targets.items():
            layer = self.architecture.layers[index].module
            before, after = (own_thread(partial(hook, index)) for hook in (self._before, self._after))
            stack.enter_context(layer.register_forward_pre_hook(before, with_kwargs=True))
            # Before the hooks with which transformers collects attentions and states, so that they see the zeros.
            stack.enter_context(target.register_forward_hook(after, prepend=True))

    def _before(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """On the layer, since only its arguments tell where in the sequence a call stands."""
        arguments = bind(module, args, kwargs)
        attention = self.architecture.layers[index].attention
        queries = span_of_call(arguments, int(getattr(attention, "layer_idx", None) or index)).queries
        start = self.position.start(queries, index)
        rows = extend(self.positions, range(queries.start - start, queries.stop - start), self.follows)
        self._rows[index] = repeat_rows(rows, len(arguments["hidden_states"]), "positions")

    def _after(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return zero_output(output, self._rows[index])
