"""During a forward pass: which tokens each adapter steers. Found once per pass from the model's own inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .selection import parse_positions, select_positions, select_tokens


if TYPE_CHECKING:
    from .config import MoReSConfig


MASK_ARGUMENT = "visual_token_mask"


@dataclass
class Inputs:
    """What the outermost module was called with."""

    input_ids: Tensor | None
    attention_mask: Tensor | None
    labels: Tensor | None
    visual_token_mask: Tensor | None
    continues: bool  # whether earlier tokens are in a cache


class TokenFinder:
    """
    Shared by all steered layers of a model. Hooks on the modules between the model and its decoder call
    [`TokenFinder.enter`] and [`TokenFinder.leave`]; whichever module is called first decides.

    Args:
        visual_token_ids (`tuple[int, ...]`): placeholders of visual tokens in `input_ids`; empty for a text model.
    """

    def __init__(self, visual_token_ids: tuple[int, ...]) -> None:
        self.visual_token_ids = visual_token_ids
        self.given_mask: Tensor | None = None  # by `visual_tokens`
        self.prompt_length: int | None = None  # of the call that the user made, while generate() extends it
        self._inputs: Inputs | None = None
        self._outermost: int | None = None  # depth of the module whose call is under way
        self._found: dict[tuple[Any, ...], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model starts outside any forward pass.
        return {**self.__dict__, "_inputs": None, "_outermost": None, "_found": {}, "given_mask": None}

    # ------------------------------------------------------------------ hooks

    def enter(self, depth: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """
        Before the forward of a module on the way to the decoder, `depth` modules below the model. Takes
        `visual_token_mask` out of the arguments.

        Raises:
            `RuntimeError`: in a replica of `nn.DataParallel`, whose threads share this object.
        """
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "MoReS does not work under nn.DataParallel. Start one process per GPU (torchrun or accelerate), or "
                "let the program see one GPU only (CUDA_VISIBLE_DEVICES=0)."
            )
        mask = kwargs.pop(MASK_ARGUMENT, None)
        # Calls only go deeper: one from no deeper is a new one, also if the last was interrupted before it left.
        if self._outermost is None or depth <= self._outermost:
            self._outermost = depth
            self._found = {}
            self._inputs = None
            past = _argument(module, args, kwargs, "past_key_values")
            self._inputs = Inputs(
                input_ids=_argument(module, args, kwargs, "input_ids"),
                attention_mask=_argument(module, args, kwargs, "attention_mask"),
                labels=_argument(module, args, kwargs, "labels"),
                visual_token_mask=self.given_mask if mask is None else mask,
                continues=past is not None and bool(past.get_seq_length() > 0),
            )
        return args, kwargs

    def leave(self, depth: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the forward, also one that failed."""
        if depth == self._outermost:
            self._outermost = None
            self._inputs = None
            self._found = {}

    # ------------------------------------------------------------------ what layers ask

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def positions(self, config: MoReSConfig, hidden: Tensor) -> Tensor | None:
        """
        The tokens that an adapter steers.

        Args:
            config ([`MoReSConfig`]): the adapter's options.
            hidden (`torch.Tensor`): `[batch, tokens, D]`, a layer's output.

        Returns:
            `torch.Tensor`: int64 `[steered]`, positions in `hidden` flattened to `[batch·tokens, D]`.

        Raises:
            `RuntimeError`: if the decoder was called in a way that does not tell its tokens.
            `ValueError`: if `visual_token_mask` does not fit the tokens.
        """
        spread = (config.token_selection, config.token_ratio, config.token_grouping, config.seed)
        key = (config.token_positions, *spread, *hidden.shape[:2])
        if key not in self._found:
            if config.token_positions is None:
                visual = self._visual(hidden)
                chosen = select_tokens(
                    visual, config.token_ratio, config.token_selection, config.seed, config.token_grouping
                )
            else:
                chosen = select_positions(self._prompt(hidden), *parse_positions(config.token_positions))
            self._found[key] = chosen.flatten().nonzero().squeeze(1)
        return self._found[key].to(hidden.device)

    def _visual(self, hidden: Tensor) -> Tensor:
        """Bool `[batch, tokens]`: the visual tokens."""
        inputs = self._known()
        mask = inputs.visual_token_mask
        if mask is not None:
            _check_mask(mask, hidden.shape[:2])
            missing = hidden.shape[1] - mask.shape[1]
            if mask is self.given_mask and missing:  # of the prompt, in generate()
                if inputs.continues:
                    return torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
                mask = torch.nn.functional.pad(mask, (0, max(missing, 0)))  # there is no cache
            _check_mask(mask, hidden.shape[:2], fits=mask.shape[1] == hidden.shape[1])
            return _repeat_rows(mask, len(hidden), MASK_ARGUMENT)
        if inputs.input_ids is None:
            raise RuntimeError(
                "MoReS cannot tell which tokens are visual, since the model was called without input_ids. Pass them, "
                "or pass visual_token_mask (bool, [batch, tokens]) to the forward call; around generate(), use "
                "`with peft_ext.visual_tokens(model, mask):`."
            )
        ids = inputs.input_ids
        if ids.shape != hidden.shape[:2]:
            raise RuntimeError(
                f"MoReS cannot tell which tokens are visual: input_ids have shape {tuple(ids.shape)}, but the "
                f"decoder's states are {tuple(hidden.shape[:2])} tokens. Models that insert visual tokens inside the "
                "decoder need visual_token_mask in the forward call."
            )
        visual = torch.zeros_like(ids, dtype=torch.bool)
        for token_id in self.visual_token_ids:
            visual |= ids == token_id
        return visual

    def _prompt(self, hidden: Tensor) -> Tensor:
        """Bool `[batch, tokens]`: the prompt's text tokens: not padding, not visual, before the first label."""
        inputs = self._known()
        batch, tokens = hidden.shape[:2]
        prompt = torch.ones(batch, tokens, dtype=torch.bool, device=hidden.device)
        if inputs.continues:
            return ~prompt
        if inputs.attention_mask is not None and inputs.attention_mask.dim() == 2:
            real = _repeat_rows(inputs.attention_mask, batch, "attention_mask")[:, -tokens:].bool()
            prompt &= real.to(prompt.device)
        labels = inputs.labels
        # One class per sample ends no prompt.
        if labels is not None and labels.dim() == 2 and labels.shape[1] == tokens:
            prompt &= ((labels != -100).long().cumsum(1) == 0).to(prompt.device)
            if not bool(prompt.any()):
                raise ValueError(
                    "token_positions: the first token of every sample has a label, so there is no prompt to steer. "
                    "Set labels to -100 on the prompt's tokens."
                )
        if self.prompt_length is not None:
            prompt[:, self.prompt_length :] = False
        if inputs.input_ids is not None and inputs.input_ids.shape == prompt.shape:
            for token_id in self.visual_token_ids:
                prompt &= (inputs.input_ids != token_id).to(prompt.device)
        return prompt

    def _known(self) -> Inputs:
        if self._inputs is None:
            raise RuntimeError(
                "MoReS does not know which tokens to steer: decoder layers were called outside the model's forward. "
                "Call the model, or disable the adapter around this call (`with model.disable_adapter():`). If this "
                "happens in a backward pass with gradient checkpointing, this transformers version repeats a layer's "
                "hooks there; upgrade it (5.23 does not)."
            )
        return self._inputs


def _check_mask(mask: Any, shape: Sequence[int | str], fits: bool = True) -> None:
    kind = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2 or not len(mask) or not fits:
        raise ValueError(
            f"visual_token_mask must be a bool tensor of shape ({', '.join(map(str, shape))}), one value per token, "
            f"but it is {kind}."
        )


def _repeat_rows(mask: Tensor, rows: int, name: str) -> Tensor:
    """As generate() repeats samples for beams."""
    if rows % max(len(mask), 1):
        raise ValueError(f"{name} has {len(mask)} rows, but the batch has {rows}; give one row per sample.")
    return mask if len(mask) == rows else mask.repeat_interleave(rows // len(mask), 0)


@lru_cache(maxsize=256)
def _parameters(forward: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)


def _argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """An argument of a module's forward, whether it was passed by name or by position."""
    if name in kwargs:
        return kwargs[name]
    names = _parameters(type(module).forward)[1:]  # without self
    return args[names.index(name)] if name in names and names.index(name) < len(args) else None


@contextmanager
def visual_tokens(model: nn.Module, visual_token_mask: Tensor) -> Iterator[None]:
    """
    Tell MoReS which tokens are visual, for calls that do not pass on arguments, such as `generate(inputs_embeds=…)`.

    Args:
        model (`torch.nn.Module`): a model with MoReS adapters.
        visual_token_mask (`torch.Tensor`): bool `[batch, tokens]`, for the tokens of the prompt.

    Raises:
        `ValueError`: if the model has no MoReS adapter that chooses among tokens, or the mask is not of that kind.

    Example:

        ```py
        >>> with visual_tokens(model, mask):
        ...     model.generate(inputs_embeds=embeddings, attention_mask=attention_mask)
        ```
    """
    finders = {id(finder): finder for m in model.modules() if (finder := getattr(m, "finder", None)) is not None}
    if not finders:
        raise ValueError(
            f"model is a {type(model).__name__} without a MoReS adapter after decoder layers, so no token is chosen "
            "in it; add one with get_peft_model."
        )
    _check_mask(visual_token_mask, ("batch", "tokens"))
    before = {key: finder.given_mask for key, finder in finders.items()}
    for finder in finders.values():
        finder.given_mask = visual_token_mask
    try:
        yield
    finally:
        for key, finder in finders.items():
            finder.given_mask = before[key]
