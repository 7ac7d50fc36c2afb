"""Find the tokens that each adapter steers in a forward pass, from the call's inputs, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .coverage.call import MASK_ARGUMENT, Call, read_call
from .coverage.choice import choose, options_key
from .coverage.prompt import Prompt
from .coverage.trace import Steered, cache_of, leave_trace
from .coverage.visual import Given, Known, check_mask, visual_tokens_of


if TYPE_CHECKING:
    from .config import MoReSConfig


_numbers = count()


class TokenFinder:
    """
    Finds the tokens for all steered layers of a model. Hooks on the modules between the model and its decoder call
    [`TokenFinder.enter`] and [`TokenFinder.leave`]; whichever module is called first decides. A text model has no
    `visual_token_ids`, the placeholders in `input_ids`.
    """

    def __init__(self, visual_token_ids: tuple[int, ...]) -> None:
        self.layers: list[Any] = []
        self.known = Known(visual_token_ids)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model starts outside any call.
        return {"layers": self.layers, "known": Known(self.known.visual_token_ids)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._outermost: int | None = None  # depth of the module whose call is under way
        self._call: Call | None = None
        self._known = self.known  # what of it is about this call
        self._chosen: dict[Any, tuple[Tensor, Steered] | None] = {}
        self._positions: dict[Any, Tensor] = {}

    # ------------------------------------------------------------------ hooks

    def enter(self, depth: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """
        Before the forward of a module on the way to the decoder, `depth` modules below the model. Takes
        `visual_token_mask` out of the arguments.

        Raises:
            `RuntimeError`: if the call does not tell the tokens to steer; or in a replica of `nn.DataParallel`, whose
                threads share this object.
            `ValueError`: if a mask does not fit the tokens, or the cache was not steered as the prompt asks for.
        """
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "MoReS does not work under nn.DataParallel. Start one process per GPU (torchrun or accelerate), or "
                "let the program see one GPU only (CUDA_VISIBLE_DEVICES=0)."
            )
        mask = kwargs.pop(MASK_ARGUMENT, None)
        # Calls only go deeper: one from no deeper is a new one, also if the last was interrupted before it left.
        if self._outermost is None or depth <= self._outermost:
            self._forget()
            self._outermost = depth
            self._begin(module, args, kwargs, mask)
        return args, kwargs

    def leave(self, depth: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the forward, also one that failed."""
        if depth == self._outermost:
            if output is not None:
                self._finish(output)
            self._forget()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Any) -> None:
        active = self._active()
        try:
            self._call = read_call(module, args, kwargs, mask)
        except RuntimeError:
            if active:
                raise
            return
        self._known = self.known.of(self._call)
        for config in active.values():
            self._choose(config, self._call)

    def _active(self) -> dict[Any, MoReSConfig]:
        """The options of the adapters that steer in this call; one of those that choose the same tokens."""
        return {
            options_key(layer.configs[name]): layer.configs[name]
            for layer in self.layers
            if not layer.disable_adapters
            for name in layer.active_adapters
            if name in layer.configs
        }

    def _choose(self, config: MoReSConfig, call: Call) -> tuple[Tensor, Steered] | None:
        key = options_key(config)
        if key not in self._chosen:
            self._chosen[key] = choose(config, call, self._known)
        return self._chosen[key]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _finish(self, output: Any) -> None:
        """Note on the cache what the call has put into it."""
        call, known = self._call, self._known
        if call is None or (cache := cache_of(output) if call.cache is None else call.cache) is None:
            return
        trace, prompt = call.trace, known.prompt
        if prompt is None or call.start < prompt.length:
            try:
                trace.visual, trace.known_from = visual_tokens_of(call, known)
            except (RuntimeError, ValueError):  # only where no token was chosen by it
                trace.known_from = call.end
            trace.given = None if known.given is None else known.given.number
        if prompt is not None:
            trace.prompt_length = prompt.length
        trace.apart = known.apart
        trace.length = call.end
        trace.steered |= {key: found[1] for key, found in self._chosen.items() if found is not None}
        leave_trace(cache, trace)

    # ------------------------------------------------------------------ what layers ask

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def positions(self, config: MoReSConfig, hidden: Tensor) -> Tensor:
        """
        The tokens that an adapter steers in a layer's output `[batch, tokens, D]`: int64 `[steered]`, positions in it
        flattened to `[batch·tokens, D]`. Raises `RuntimeError` if the decoder was called in a way that does not tell
        its tokens.
        """
        call = self._call
        if call is None:
            raise RuntimeError(
                "MoReS does not know which tokens to steer: decoder layers were called outside the model's forward. "
                "Call the model, or disable the adapter around this call (`with model.disable_adapter():`). If this "
                "happens in a backward pass with gradient checkpointing, this transformers version repeats a layer's "
                "hooks there; upgrade it (5.23 does not)."
            )
        if (call.rows, call.tokens) != hidden.shape[:2]:
            raise RuntimeError(
                f"MoReS cannot tell which tokens to steer: the call has {call.rows} rows of {call.tokens} tokens, but "
                f"the decoder's states are {tuple(hidden.shape[:2])} tokens. Models that insert visual tokens inside "
                "the decoder need visual_token_mask, of the states' shape, in the forward call."
            )
        place = options_key(config), hidden.device
        if place not in self._positions:
            found = self._choose(config, call)
            self._positions[place] = (
                torch.empty(0, dtype=torch.int64, device=hidden.device)
                if found is None
                else found[0].flatten().nonzero().squeeze(1).to(hidden.device)
            )
        return self._positions[place]

    # ------------------------------------------------------------------ what is said around calls

    @contextmanager
    def knows(self, prompt: Prompt, visual_token_mask: Any = None) -> Iterator[None]:
        """
        Around generate(): its prompt.

        Raises:
            `ValueError`: if it was said that more of the prompt follows, which generate() never leaves open.
        """
        if self.known.unfinished:
            raise ValueError(
                "generate() needs a whole prompt: call it after `with unfinished_prompt(model):`, where forward calls "
                "fill the cache."
            )
        if self.known.prompt is not None and prompt.assists:
            prompt = self.known.prompt  # a model that assists itself is called for the same prompt
        with self._told(prompt=prompt), nullcontext() if visual_token_mask is None else self.sees(visual_token_mask):
            yield

    def sees(self, visual_token_mask: Tensor) -> AbstractContextManager[None]:
        """Around calls: the prompt's visual tokens."""
        check_mask(visual_token_mask, ("batch", "tokens"))
        return self._told(given=Given(visual_token_mask, next(_numbers)))

    def expects_more(self) -> AbstractContextManager[None]:
        """Around calls with a prompt's beginning."""
        return self._told(unfinished=True)

    @contextmanager
    def _told(self, **facts: Any) -> Iterator[None]:
        before = self.known
        self.known = replace(before, **facts)
        try:
            yield
        finally:
            self.known = before
