"""Say about calls what their arguments do not tell: which tokens are visual, or that more of the prompt follows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from .finder import TokenFinder


@contextmanager
def visual_tokens(model: nn.Module, visual_token_mask: Tensor) -> Iterator[None]:
    """
    Context manager that tells MoReS which tokens are visual. Use it for calls without `input_ids` that do not pass on
    other arguments, such as `generate(inputs_embeds=…)`.

    Args:
        model (`torch.nn.Module`):
            A model with MoReS adapters.
        visual_token_mask (`torch.Tensor`):
            Bool `[batch, tokens]` over the tokens of the prompt: all of them, or those that are not in a cache yet.

    Raises:
        `ValueError`: If the model has no MoReS adapter that selects tokens, or the mask has another dtype or shape.

    Example:

        ```py
        >>> with visual_tokens(model, mask):
        ...     model.generate(inputs_embeds=embeddings, attention_mask=attention_mask)
        ```
    """
    with ExitStack() as stack:
        for finder in _finders(model):
            stack.enter_context(finder.sees(visual_token_mask))
        yield


@contextmanager
def unfinished_prompt(model: nn.Module) -> Iterator[None]:
    """
    Context manager for filling a cache with the beginning of a prompt, such as a system prompt, when `token_positions`
    names the prompt's last tokens. Inside it, only the prompt's first tokens are steered. The next call outside it
    ends the prompt.

    Args:
        model (`torch.nn.Module`):
            A model with MoReS adapters.

    Raises:
        `ValueError`: If the model has no MoReS adapter that selects tokens.

    Example:

        ```py
        >>> with torch.no_grad(), unfinished_prompt(model):
        ...     cache = model(**system_prompt, use_cache=True).past_key_values
        >>> model.generate(**whole_prompt, past_key_values=copy.deepcopy(cache))
        ```
    """
    with ExitStack() as stack:
        for finder in _finders(model):
            stack.enter_context(finder.expects_more())
        yield


def _finders(model: nn.Module) -> list[TokenFinder]:
    found = (getattr(module, "finder", None) for module in model.modules())
    finders = {id(finder): finder for finder in found if isinstance(finder, TokenFinder)}
    if not finders:
        raise ValueError(
            f"model is a {type(model).__name__} without a MoReS adapter after decoder layers, so no token is chosen "
            "in it; add one with get_peft_model."
        )
    return list(finders.values())
