"""LLaVA Steering Factory: compose a vision-language model, train it in two stages, evaluate it (Bi et "
"al., section 6)."""

from .compose import Composed, compose, load
from .methods import Method
from .modeling import LlavaFactoryConfig, LlavaFactoryForConditionalGeneration


__all__ = ["Composed", "LlavaFactoryConfig", "LlavaFactoryForConditionalGeneration", "Method", "compose", "load"]
