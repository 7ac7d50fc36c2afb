"""One forward pass without knockouts, and what later passes can take over from it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from ...tuners.mores import MoReSLayer
from ..model.architecture import Architecture, bind
from ..model.masks import Span, allowed_edges, cache_name
from ..model.threads import own_thread


class NotReusable(ValueError):
    """A model or an input whose clean pass does not determine what a knocked-out one computes before the target."""


class _NotClosed(Exception):
    """Some token before a first target attends to a later one: the first targets that would do."""

    def __init__(self, firsts: list[int]) -> None:
        self.firsts = firsts


@dataclass
class LayerRun:
    """What a layer saw in the clean pass. T tokens are kept, from the first target on."""

    hidden: Tensor  # `[batch, T, D]`, its input
    # `[batch, heads, tokens, D/heads]` of all tokens
    keys: Tensor
    values: Tensor
    allowed: Tensor  # bool `[batch or 1, 1, T, tokens]`, the model's own edges
    arguments: dict[str, Any]  # its other arguments
    cache_name: str  # the argument that holds the cache
    # `[batch, T, D]`, what the decoder adds to its output before the next layer (Qwen3-VL's DeepStack); `None` for
    # nothing
    added: Tensor | None = None


@dataclass
class CleanRun:
    """A forward pass without knockouts."""

    logits: Tensor  # float32 `[batch, vocabulary]` at the readout position of each row
    # By first target, the position that its knockout's effects begin at: its own, or the start of the block of tokens
    # around it that attend both ways (Gemma 3's images)
    firsts: dict[int, int]
    start: int  # the first kept position, the smallest of these
    length: int  # tokens in the sequence
    layers: list[LayerRun] = field(default_factory=list)  # empty if nothing was kept
    final: Tensor | None = None  # `[batch, T, D]`, the last layer's output


def logits_at(
    architecture: Architecture, model: nn.Module, inputs: dict[str, Any], readout: Tensor, **more: Any
) -> Tensor:
    """
    A forward pass's logits, float32 `[batch, vocabulary]`, at one position of each row: `readout`, int64 `[batch]`.
    """
    length = _length(inputs)
    if (
        bool((readout == length - 1).all())
        and "logits_to_keep" in inspect.signature(architecture.model.forward).parameters
    ):
        logits: Tensor = model(**inputs, **more, logits_to_keep=1).logits
        return logits[:, -1].float()
    logits = model(**inputs, **more).logits
    readout = readout.to(logits.device) + architecture.virtual_tokens
    return logits[torch.arange(len(logits), device=logits.device), readout].float()


def _length(inputs: dict[str, Any]) -> int:
    tokens = inputs.get("input_ids")
    return int((inputs["inputs_embeds"] if tokens is None else tokens).shape[1])


def clean_run(
    architecture: Architecture, model: nn.Module, inputs: dict[str, Any], readout: Tensor, targets: Iterable[int]
) -> CleanRun:
    """
    Run the model as it is. Keep each layer's keys and values, and its states from the first of `targets` on, which are
    the first targets of the knockouts to come.

    Raises [`NotReusable`] if all tokens attend both ways, as in PaliGemma's prefix, or a layer is of a kind whose
    passes cannot be shortened, or steered by MoReS.
    """
    length = _length(inputs)
    if architecture.virtual_tokens:
        raise NotReusable("virtual tokens of prompt tuning come before the prompt")
    for layer in model.modules():
        # It tells its tokens from the inputs of the whole model, which a pass through some layers does not have.
        if isinstance(layer, MoReSLayer) and layer.finder is not None and not layer.disable_adapters:
            raise NotReusable("a MoReS adapter steers tokens after decoder layers, as a whole forward pass tells them")
    targets = list(dict.fromkeys(targets))
    firsts = targets
    while True:
        recorder = _Recorder(architecture, firsts, length)
        # Without a config: sliding layers then keep all keys, which a cache of the model's own would drop.
        cache = DynamicCache()
        try:
            with recorder, torch.no_grad():
                logits = logits_at(architecture, model, inputs, readout, past_key_values=cache, use_cache=True)
        except _NotClosed as earlier:
            if any(new == 0 for new, old in zip(earlier.firsts, firsts, strict=True) if old > 0):
                raise NotReusable(
                    "tokens from the first one on attend to later ones (a bidirectional prefix, as PaliGemma's), so a "
                    "knockout changes all states"
                ) from None
            firsts = earlier.firsts
            continue
        moved = dict(zip(targets, firsts, strict=True))
        return CleanRun(logits, moved, min(firsts), length, recorder.layers(cache), recorder.final)


class _Recorder:
    def __init__(self, architecture: Architecture, firsts: list[int], length: int) -> None:
        self.architecture, self.firsts, self.start, self.length = architecture, firsts, min(firsts), length
        self.calls: list[dict[str, Any]] = []
        self.hidden: list[Tensor] = []
        self.added: list[Tensor | None] = []
        self.allowed: list[Tensor] = []
        self.final: Tensor | None = None
        self._output: Tensor | None = None
        self._masks: dict[int, tuple[Any, Tensor]] = {}
        self._slices: dict[int, tuple[Any, Any]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> None:
        before, after, mask = own_thread(self._before), own_thread(self._after), own_thread(self._mask)
        with ExitStack() as stack:
            for layer in self.architecture.layers:
                if layer.attention is None:
                    raise NotReusable(f"layer {layer.index} {layer.problem}")
                stack.enter_context(layer.module.register_forward_pre_hook(before, with_kwargs=True))
                stack.enter_context(layer.module.register_forward_hook(after))
                stack.enter_context(layer.attention.register_forward_pre_hook(mask, with_kwargs=True))
            self._stack = stack.pop_all()

    def __exit__(self, *_: Any) -> None:
        self._stack.close()
        self._output, self._masks = None, {}

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = bind(module, args, kwargs)
        hidden = arguments.pop("hidden_states")
        if hidden.shape[1] != self.length:
            raise NotReusable(f"the decoder runs {hidden.shape[1]} tokens for a prompt of {self.length}")
        kept = hidden[:, self.start :]
        if self._output is not None:
            before = self._output[:, self.start :].to(kept.device)
            same = hidden is self._output or torch.equal(kept, before)
            self.added.append(None if same else kept - before)
        self.hidden.append(kept.clone())
        self.calls.append(arguments)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._output = output[0] if isinstance(output, tuple) else output
        self.final = (
            self._output[:, self.start :].clone() if len(self.hidden) == len(self.architecture.layers) else None
        )

    def _mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = bind(module, args, kwargs)
        mask = arguments.get("attention_mask")
        if id(mask) not in self._masks:  # most layers share one
            self._masks[id(mask)] = (mask, self._read(mask, module, arguments["hidden_states"].device))
        self.allowed.append(self._masks[id(mask)][1])

    def _read(self, mask: Any, attention: nn.Module, device: torch.device) -> Tensor:
        if mask is None and getattr(attention, "is_causal", True):
            rows = Span(range(self.start, self.length), range(self.length))
            return allowed_edges(None, rows, attention, device)
        whole = allowed_edges(mask, Span(range(self.length), range(self.length)), attention, device)
        if whole.shape[-1] != self.length or whole.shape[1] != 1:
            raise NotReusable(f"the attention mask has the shape {tuple(whole.shape)}")
        if mask is not None and mask.dtype != torch.bool and bool((whole & (mask != 0)).any()):
            raise NotReusable("the attention mask holds a bias besides the blocked edges")
        closed = [_close(first, whole) for first in self.firsts]
        if closed != self.firsts:
            raise _NotClosed(closed)
        return whole[:, :, self.start :].clone()

    def layers(self, cache: Cache) -> list[LayerRun]:
        if len(self.hidden) != len(self.architecture.layers):
            raise NotReusable("the decoder does not call each of its layers once")
        self.added.append(None)
        found = []
        for index, layer in enumerate(self.architecture.layers):
            number = getattr(layer.attention, "layer_idx", None)
            stored: Any = cache.layers[index if number is None else number]
            if getattr(stored, "keys", None) is None or stored.keys.shape[-2] != self.length:
                raise NotReusable(f"layer {index} has no keys of its own in the cache")
            arguments = {
                name: self._sliced(name, value)
                for name, value in self.calls[index].items()
                if name != "attention_mask" and not isinstance(value, Cache)
            }
            found.append(
                LayerRun(
                    self.hidden[index],
                    stored.keys,
                    stored.values,
                    self.allowed[index],
                    arguments,
                    cache_name(self.calls[index]),
                    self.added[index],
                )
            )
        return found

    def _sliced(self, name: str, value: Any) -> Any:
        """An argument for the kept tokens only; layers that share one share its part."""
        if id(value) not in self._slices:
            self._slices[id(value)] = value, self._slice(name, value)
        return self._slices[id(value)][1]

    def _slice(self, name: str, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(self._sliced(name, part) for part in value)
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        axis = -2 if name == "position_embeddings" else -1
        if "position" not in name or value.dim() < -axis or value.shape[axis] != self.length:
            if self.length in value.shape:
                raise NotReusable(f"its layers take {name!r}, of which the part for some tokens cannot be told")
            return value
        return value.narrow(axis, self.start, self.length - self.start)


def _close(first: int, allowed: Tensor) -> int:
    """The last position up to `first` that no earlier token looks beyond. `allowed`: bool `[…, tokens, tokens]`."""
    while (across := allowed[..., :first, first:].any(-1).flatten(0, -2).any(0)).any():
        first = int(across.int().argmax())
    return first
