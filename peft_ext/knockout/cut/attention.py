"""Attention knockout (https://arxiv.org/abs/2411.18620): block edges between groups of tokens in some layers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model.architecture import bind, inspect_model
from ..model.implementation import editable_attention
from ..model.masks import Span, allowed_edges, encode, open_one, repeat_rows, span_of_call
from ..model.position import PromptPosition
from ..model.threads import own_thread
from .edges import check_pairs
from .scope import KnockoutScope


class AttentionKnockout(KnockoutScope):
    """
    Context manager that blocks attention. Inside it, the target of each pair cannot attend to the source in the given
    layers.

    Paper: Zhang et al., [Cross-modal Information Flow in Multimodal Large Language
    Models](https://arxiv.org/abs/2411.18620).

    The model's own mask (causal, padding, sliding window) is kept; edges are only removed. Blocked weights are exactly
    0, and the rest of each row sums to 1. A row that loses all its edges adds nothing to the residual stream, in every
    attention implementation. Several knockouts can be active at once. On exit, also after an exception, the model is
    as it was. Only calls of the thread that entered the context are affected, so run the model in that thread. With
    flash or flex attention, the decoder runs sdpa inside the context (or eager, if it has no sdpa), in all threads.

    Args:
        model (`torch.nn.Module`):
            A decoder of transformers, with or without a vision tower or PEFT adapters.
        layers (`Sequence[int]`):
            Layer numbers, counted from 0; negative numbers count from the end.
        pairs (`list[tuple[torch.Tensor, torch.Tensor]]`):
            `(source, target)`, each a bool mask `[batch, sequence]` over the prompt. A mask of one row serves any
            batch. Beams repeat rows.
        generated (`str`, *optional*, defaults to `"follow"`):
            What happens to generated tokens. `"follow"`: each takes over the groups that hold only the last position
            of the prompt. `"fixed"`: groups stay in the prompt.
        answer_tokens (`int`, *optional*, defaults to 0):
            Number of tokens that a call may carry after the prompt, such as a given answer or the candidates of
            assisted generation. They count as generated.

    Raises:
        `ValueError`: If the model lacks a part or an argument is malformed, before anything is changed. During the
            forward pass, if the masks do not fit its inputs.

    Warns:
        `UserWarning`: If the model has none of the edges of a pair, so that nothing is blocked. On exit, if none of
            the layers was called.

    Example:

        ```py
        >>> groups = find_token_groups(processor, inputs, spans={"question": question})
        >>> with AttentionKnockout(model, range(0, 9), [(groups["image"], groups["question"])]):
        ...     logits = model(**inputs).logits
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] | int,
        pairs: Sequence[tuple[Tensor, Tensor]],
        generated: str = "follow",
        answer_tokens: int = 0,
    ) -> None:
        self.architecture = inspect_model(model)
        self.layers = self.architecture.check_layers(layers)
        self.attentions = {index: self.architecture.attention(index) for index in self.layers}
        self.edges = check_pairs(pairs, generated)
        self.position = PromptPosition(self.edges[0].length, self.architecture.virtual_tokens, answer_tokens)
        self._implementation = ""
        self._emptied: dict[int, Tensor] = {}
        self._checked: set[int] = set()

    def _forget(self) -> None:
        self._emptied, self._checked = {}, set()

    def _put_hooks(self, stack: ExitStack) -> None:
        self._implementation = stack.enter_context(editable_attention(self.architecture))
        for index, attention in self.attentions.items():
            before, after = (own_thread(partial(hook, index)) for hook in (self._before, self._after))
            stack.enter_context(attention.register_forward_pre_hook(before, with_kwargs=True))
            stack.enter_context(attention.register_forward_hook(after, prepend=True))

    def _before(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        arguments = bind(module, args, kwargs)
        arguments["attention_mask"] = self._edit(index, module, arguments)
        return (), arguments

    def _edit(self, index: int, module: nn.Module, arguments: dict[str, Any]) -> Tensor:
        """The mask of a call, without the blocked edges."""
        hidden, mask = arguments["hidden_states"], arguments.get("attention_mask")
        span = span_of_call(arguments, int(getattr(module, "layer_idx", None) or index))
        start = self.position.start(span.queries, index)
        allowed = allowed_edges(mask, span, module, hidden.device)  # [batch, heads, queries, keys]
        blocked = self._blocked(index, span, start, allowed, len(hidden))
        kept = allowed & ~blocked
        emptied = ~kept.any(-1) & allowed.any(-1)  # by us: padding rows may have been empty before
        if emptied.any():
            open_one(kept, emptied, span)
            self._emptied[index] = emptied.all(1) if emptied.shape[1] > 1 else emptied[:, 0]
        else:
            self._emptied.pop(index, None)
        if mask is None or mask.dtype == torch.bool:
            return encode(kept, self._implementation, hidden.dtype)
        # Where the model's mask holds more than two values, they stay.
        return mask.masked_fill(~kept, torch.finfo(mask.dtype).min).masked_fill(kept & ~allowed, 0)

    def _blocked(self, index: int, span: Span, start: int, allowed: Tensor, batch: int) -> Tensor:
        """The union of the pairs' edges, bool `[batch, 1, queries, keys]`."""
        queries, keys = (range(part.start - start, part.stop - start) for part in span)
        blocked = None
        for number, edges in enumerate(self.edges):
            ours = repeat_rows(edges.blocked(queries, keys, allowed.device), batch, "pairs")[:, None]
            if index not in self._checked and not (ours & allowed).any():
                warnings.warn(
                    f"pairs[{number}] blocks nothing in layer {index}: its targets attend to none of its sources "
                    "there, since they come earlier or lie outside the layer's window.",
                    stacklevel=2,
                )
            blocked = ours if blocked is None else blocked | ours
        self._checked.add(index)
        assert blocked is not None
        return blocked

    def _after(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        emptied = self._emptied.pop(index, None)
        return output if emptied is None else zero_output(output, emptied)


def zero_output(output: Any, positions: Tensor) -> Any:
    """
    A module's output, `[batch, tokens, D]` or a tuple that begins with it, with zeros at `positions`, bool `[batch or
    1, tokens]`.
    """
    first = output[0] if isinstance(output, tuple) else output
    first = first.masked_fill(positions.to(first.device).unsqueeze(-1), 0)
    return (first, *output[1:]) if isinstance(output, tuple) else first
