"""LLaVA Steering Factory (Bi et al., section 6): compose a vision-language model, train it, evaluate it."""

from ..extras import needs


with needs("vlm"):
    from .compose import Composed, compose, load
    from .methods import Method
    from .modeling import LlavaFactoryConfig, LlavaFactoryForConditionalGeneration


__all__ = ["Composed", "LlavaFactoryConfig", "LlavaFactoryForConditionalGeneration", "Method", "compose", "load"]
