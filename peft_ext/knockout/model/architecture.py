"""Find layers, their attention and MLP, the norm and the head of a transformers model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn


REMEDY = "Knockouts need a decoder whose layers each have one self-attention, such as LLaVA's, Qwen-VL's or Llama's."
# The names that transformers gives to the parts of a decoder. GPT-2's are last.
_LAYERS = ("layers", "h", "blocks")
_ATTENTION = ("self_attn", "attention", "attn", "self_attention")
_MLP = ("mlp", "feed_forward")
_NORM = ("norm", "final_layernorm", "final_layer_norm", "layer_norm", "embedding_norm", "ln_f")


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    index: int  # its number, from 0
    module: nn.Module  # the layer
    attention: nn.Module | None  # its self-attention; `None` where it has none that takes a mask
    mlp: nn.Module | None  # its feed-forward part
    problem: str = ""  # why there is no attention to knock out; empty if there is one


@dataclass(frozen=True)
class Architecture:
    """The parts of a model that knockouts need."""

    model: nn.Module  # the model itself, without PEFT's wrapper
    decoder: nn.Module  # the text decoder
    layers: list[Layer]  # its layers in order
    text_config: Any  # the decoder's configuration
    virtual_tokens: int = 0  # embeddings that prompt tuning puts before the prompt

    @property
    def norm(self) -> nn.Module:
        """The norm after the last layer. Raises `ValueError` if it cannot be told."""
        if (norm := _child(self.decoder, _NORM)) is None:
            raise ValueError(
                f"{type(self.decoder).__name__} has no final norm under any of the names {', '.join(_NORM)}. {REMEDY}"
            )
        return norm

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary."""
        return int(self._head().weight.shape[0])

    def _head(self) -> Any:
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        if head is None:
            raise ValueError(f"{type(self.model).__name__} has no output embeddings to read states with. {REMEDY}")
        return head

    def logits(self, hidden: Tensor, norm: bool = True) -> Tensor:
        """
        What the model would predict, float32 `[…, vocabulary]`, from states `[…, D]` after its last layer; `norm` says
        whether the final norm comes first, as in the model.
        """
        head = self._head()
        weight = next(self.norm.parameters(), hidden)
        states = self.norm(hidden.to(weight.device)) if norm else hidden
        scores: Tensor = head(states.to(next(head.parameters()).device)).float()
        base = head.get_base_layer() if hasattr(head, "get_base_layer") else head
        return scores if getattr(base, "scales_logits", False) else scaled_logits(scores, self.text_config)

    def attention(self, index: int) -> nn.Module:
        """The self-attention of a layer. Raises `ValueError` naming what the layer has instead."""
        layer = self.layers[index]
        if layer.attention is None:
            raise ValueError(f"layers: layer {index} ({type(layer.module).__name__}) {layer.problem}. {REMEDY}")
        return layer.attention

    def mlp(self, index: int) -> nn.Module:
        """The feed-forward part of a layer. Raises `ValueError` if it has none."""
        layer = self.layers[index]
        if layer.mlp is None:
            raise ValueError(
                f'module="mlp": layer {index} ({type(layer.module).__name__}) has no child named '
                f'{" or ".join(_MLP)}; use module="attention" or another model.'
            )
        return layer.mlp

    def check_layers(self, layers: Sequence[int] | int) -> list[int]:
        """Layer numbers, sorted and counted from 0. Raises `ValueError` for numbers that the model does not have."""
        given = [layers] if isinstance(layers, int) and not isinstance(layers, bool) else layers
        if isinstance(given, (str, bytes, bool, dict)) or not hasattr(given, "__iter__"):
            raise ValueError(f"layers must be layer numbers, such as range(0, 9), but is {layers!r}.")
        numbers: set[int] = set()
        total = len(self.layers)
        for number in given:
            if isinstance(number, bool) or not hasattr(number, "__index__"):
                raise ValueError(f"layers must be whole numbers, but holds {number!r}.")
            if not -total <= number < total:
                raise ValueError(f"layers holds {number}, but the decoder has {total} layers: give 0 to {total - 1}.")
            numbers.add(int(number) % total)
        if not numbers:
            raise ValueError("layers is empty: name at least one layer, such as range(0, 9).")
        return sorted(numbers)


def scaled_logits(scores: Tensor, text_config: Any) -> Tensor:
    """Products with the head as the model's logits: scaled and capped as the configuration says."""
    if (factor := getattr(text_config, "logit_scale", None)) is not None:  # Cohere
        scores = scores * factor
    if (divisor := getattr(text_config, "logits_scaling", None)) is not None:  # Granite
        scores = scores / divisor
    cap = getattr(text_config, "final_logit_softcapping", None)  # Gemma
    return scores if cap is None else cap * torch.tanh(scores / cap)


def inspect_model(model: nn.Module) -> Architecture:
    """
    Find the parts of a decoder of transformers, with or without vision, with or without PEFT adapters. Raises
    `ValueError` naming what the model lacks.
    """
    if hasattr(model, "named_modules"):
        _check_not_compiled(model)
    virtual, base = 0, model
    if isinstance(model, PeftModel):
        config = model.active_peft_config
        if getattr(config, "is_prompt_learning", False) and config.peft_type != PeftType.PREFIX_TUNING:
            virtual = int(config.num_virtual_tokens)  # prefix tuning's are in the cache instead
        base = model.get_base_model()
    kind = type(base).__name__
    config = getattr(base, "config", None)
    if config is None or not hasattr(base, "get_decoder"):
        raise ValueError(f"model is a {kind}, not a transformers model with a `config` and `get_decoder()`. {REMEDY}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model is a {kind}, an encoder-decoder: its prompt is not in the decoder. {REMEDY}")
    decoder: Any = base.get_decoder()  # type: ignore[operator]
    stack = _layer_list(decoder)
    if stack is None and decoder is not base and hasattr(decoder, "get_decoder"):
        decoder = decoder.get_decoder()  # some models answer with a whole language model
        stack = _layer_list(decoder)
    if stack is None:
        raise ValueError(
            f"{kind}: its decoder ({type(decoder).__name__}) has no list of layers ({', '.join(_LAYERS)}). {REMEDY}"
        )
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(text_config, "layer_types", None) or [""] * len(stack)
    layers = [_layer(index, module, kinds[index]) for index, module in enumerate(stack)]
    if all(layer.attention is None for layer in layers):
        raise ValueError(
            f"{kind}: no layer of its decoder has a self-attention: layer 0 {layers[0].problem}. {REMEDY}"
        )
    return Architecture(base, decoder, layers, text_config, virtual)


def _check_not_compiled(model: nn.Module) -> None:
    """Compiled code does not look for hooks that came after it was compiled: a knockout would do nothing."""
    for name, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if (
            "_orig_mod" in module._modules  # torch.compile(module)
            or getattr(module, "_compiled_call_impl", None) is not None  # module.compile()
            or hasattr(forward, "_torchdynamo_orig_callable")  # module.forward = torch.compile(module.forward)
        ):
            raise ValueError(
                f"model is compiled ({name or 'all of it'}), and compiled code passes over knockouts: give and call "
                "the model as it was before torch.compile, or load it anew."
            )


def _layer_list(decoder: Any) -> nn.ModuleList | None:
    for name in _LAYERS:
        if isinstance(found := getattr(decoder, name, None), nn.ModuleList) and len(found):
            return found
    return None


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((child for name in names if isinstance(child := getattr(module, name, None), nn.Module)), None)


def _layer(index: int, module: nn.Module, kind: str) -> Layer:
    mlp = _child(module, _MLP)
    attention: Any = _child(module, _ATTENTION)
    if attention is not None and not parameters(type(attention).forward) and hasattr(attention, "self_attn"):
        attention = attention.self_attn
    problem = _problem(module, attention, kind)
    return Layer(index, module, None if problem else attention, mlp, problem)


def _problem(layer: nn.Module, attention: nn.Module | None, kind: str) -> str:
    """Why there is no attention to knock out; empty if there is one."""
    if attention is None:
        others = ", only cross-attention" if hasattr(layer, "cross_attn") else ""
        return f"has no child named {', '.join(_ATTENTION)}{others}"
    name, takes = type(attention).__name__, parameters(type(attention).forward)
    if "linear" in str(kind) or "Linear" in name or "DeltaNet" in name or "Mamba" in name:
        return f"has linear attention ({name}), which has no edges to block"
    if "attention_mask" not in takes:
        return f"has an attention ({name}) that takes no attention_mask"
    if "position_bias" in takes:  # MPT, whose masks are True where nothing is attended
        return f"has an attention ({name}) whose mask is of its own kind"
    if "residual" in takes:  # Bloom: without what the attention adds, the residual stream would be gone too
        return f"has an attention ({name}) that adds the residual stream itself"
    return ""


@lru_cache(maxsize=256)
def parameters(forward: Any) -> tuple[str, ...]:
    """Names of a forward's arguments, without self."""
    return tuple(inspect.signature(forward).parameters)[1:]


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    return {**dict(zip(parameters(type(module).forward), args, strict=False)), **kwargs}
