"""
The tokens that a call steers. They are chosen among those of the whole prompt, of which a call may hold a part: a
chunk, what follows a cache, or nothing, when it continues a text. Where this cannot be told, the call is refused.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..selection import parse_positions, select_positions, select_tokens
from .call import Call
from .padding import packed_starts, real_tokens, repeat_rows
from .trace import Steered
from .visual import Known, visual_tokens_of


if TYPE_CHECKING:
    from ..config import MoReSConfig


def options_key(config: MoReSConfig) -> tuple[Any, ...]:
    """The options that decide which tokens are chosen."""
    spread = (config.token_selection, config.token_ratio, config.token_grouping, config.seed)
    return (config.token_positions,) if config.token_positions is not None else spread


def choose(config: MoReSConfig, call: Call, known: Known) -> tuple[Tensor, Steered] | None:
    """
    Choose the tokens that an adapter steers in a call.

    Returns:
        `(torch.Tensor, Steered)`: bool `[rows, tokens]`, and what the cache then holds. `None` if the call only holds
            tokens that follow a prompt.

    Raises:
        `RuntimeError`, `ValueError`: if the prompt's tokens cannot be told, or the cache was not steered as they ask
            for.
    """
    key, prompt = options_key(config), known.prompt
    if known.apart and config.token_positions is not None:
        raise RuntimeError(
            "generate() has called the model with other tokens than its prompt's, as guidance_scale and token_healing "
            "do, so MoReS cannot tell where they are in the prompt. Leave these options out."
        )
    if prompt is not None:
        follows = call.start >= prompt.length
    else:
        follows = config.token_positions is not None and _follows_prompt(call, call.trace.steered.get(key), known)
    if follows:
        return None
    chosen, known_from = _choose_in_prompt(config, call, known)
    before = call.trace.steered_before(key, call.start, call.rows, call.device)
    if not torch.equal(chosen[:, known_from : call.start], before[:, known_from:]):
        raise ValueError(_differs(config, call.start))
    end = known.total(call)
    finished = end <= call.end and (prompt is not None or not known.unfinished)
    here = chosen[:, call.start : call.end]
    steered = Steered(chosen[:, : call.end], end if finished else None)
    return F.pad(here, (0, call.tokens - here.shape[1])), steered


def _follows_prompt(call: Call, before: Steered | None, known: Known) -> bool:
    """
    Whether a call outside generate() holds what comes after the prompt in its cache: one token, or labels alone.

    Raises:
        `ValueError`: if this cannot be told.
    """
    if not call.known_past:
        raise ValueError(
            f"The cache holds {call.start} tokens, but not all of them came from calls of the adapted model, so MoReS "
            "cannot tell whether they are a prompt. Fill the cache with the adapted model, or pass the whole prompt "
            "to generate()."
        )
    prompt_end = None if before is None else before.prompt_end
    if prompt_end is None or call.start < prompt_end or known.unfinished:
        return False
    labels = call.labels
    if call.tokens == 1 or (isinstance(labels, Tensor) and labels.dim() == 2 and bool((labels != -100).all())):
        return True
    raise ValueError(
        f"{call.tokens} tokens follow a prompt in the cache, and MoReS cannot tell whether they are more of the "
        "prompt. If so, fill the cache inside `with peft_ext.unfinished_prompt(model):`. If they are an answer, pass "
        "labels without -100."
    )


def _choose_in_prompt(config: MoReSConfig, call: Call, known: Known) -> tuple[Tensor, int]:
    """`(bool [rows, known.total(call) or more], from where on it is known)`. In generate() the first call decides."""
    kept = {} if known.prompt is None else known.prompt.chosen
    key = options_key(config), call.rows, call.device
    if key not in kept:
        if config.token_positions is None:
            visual, known_from = visual_tokens_of(call, known)
            _check_groups(config, call, known, visual, known_from)
            spread = config.token_ratio, config.token_selection, config.seed, config.token_grouping
            kept[key] = select_tokens(visual, *spread), known_from
        else:
            first, last = parse_positions(config.token_positions)
            if known.unfinished and known.prompt is None:
                last = 0
            if last and call.learns and call.labels is None and known.prompt is None:
                warnings.warn(
                    f"token_positions={config.token_positions!r}: a language model is trained without labels, so the "
                    "last tokens of the whole input are steered, its answer included, while generate() steers those "
                    f"of the prompt. Pass labels, or steer first tokens alone (token_positions='f{max(first, 1)}').",
                    UserWarning,
                    stacklevel=2,
                )
            kept[key] = select_positions(_text(call, known), first, last), 0
    return kept[key]


def _check_groups(config: MoReSConfig, call: Call, known: Known, visual: Tensor, known_from: int) -> None:
    """
    Raises:
        `ValueError`: if a group of visual tokens is not known as a whole.
    """
    if config.token_selection == "all":
        return
    by_sample = config.token_grouping == "sample"
    if known_from and bool((visual[:, known_from:] if by_sample else visual[:, known_from : known_from + 1]).any()):
        raise ValueError(
            f"MoReS does not know whether the first {known_from} tokens in the cache are visual, so it cannot choose "
            "among those that follow. Fill the cache with the adapted model and input_ids, or pass the whole prompt "
            "to generate()."
        )
    if known.prompt is None and call.position_ids is not None:
        here = visual[:, call.start : call.end]
        # Where images are told apart, only one that goes on would be taken for another.
        _check_packed(call, _real(call)[:, call.start :] if by_sample else here)


def _check_packed(call: Call, tokens: Tensor) -> None:
    if call.position_ids is not None and bool(packed_starts(call.position_ids, tokens).any()):
        raise ValueError(
            "position_ids begin anew inside a row, so it holds several texts, and MoReS chooses tokens of one. Give "
            "each text a row of its own (no packing, no padding-free batches)."
        )


def _real(call: Call) -> Tensor:
    return real_tokens(call.attention_mask, call.rows, call.start, call.tokens, call.device)


def _text(call: Call, known: Known) -> Tensor:
    """Bool `[rows, known.total(call)]`: the prompt's text tokens: not padding, not visual, before the first label."""
    prompt, labels = known.prompt, call.labels
    if prompt is None:
        text = _real(call)
        _check_packed(call, text[:, call.start :])
    elif prompt.attention_mask is not None:
        text = repeat_rows(prompt.attention_mask.to(call.device).bool(), call.rows, "attention_mask")
    else:
        text = _real(call)
        if call.end < prompt.length and not bool(text.all()):
            raise ValueError("MoReS needs to know the padding of the whole prompt: pass attention_mask to generate().")
        text = F.pad(text, (0, prompt.length - call.end), value=True)
    visual, known_from = visual_tokens_of(call, known)
    if known_from:
        raise ValueError(
            f"token_positions leaves out visual tokens, but MoReS does not know whether the first {known_from} tokens "
            "in the cache are visual. Fill the cache with the adapted model and input_ids."
        )
    text = text & ~visual[:, : text.shape[1]]
    # One class per sample ends no prompt.
    if prompt is None and isinstance(labels, Tensor) and labels.dim() == 2 and labels.shape[1] == call.tokens:
        text[:, call.start :] &= ((labels != -100).long().cumsum(1) == 0).to(text.device)
        if not bool(text.any()):
            raise ValueError(
                "token_positions: the first token of every sample has a label, so there is no prompt to steer. Set "
                "labels to -100 on the prompt's tokens."
            )
    return text


def _differs(config: MoReSConfig, start: int) -> str:
    if config.token_positions is None:
        options = f"token_selection={config.token_selection!r} with token_grouping={config.token_grouping!r} chooses"
        reason = "an image goes on after the cache"
        remedy = "Fill it with whole images, all of a sample's for token_grouping='sample'"
    else:
        options = f"token_positions={config.token_positions!r} chooses"
        reason = "they were taken for a whole prompt"
        remedy = "Fill it inside `with peft_ext.unfinished_prompt(model):`, and without the prompt's last tokens"
    return (
        f"Other ones of the {start} tokens in the cache were steered than {options} in the whole prompt: the adapter "
        f"was off when the cache was filled, or {reason}. {remedy}; or pass the whole prompt without past_key_values."
    )
