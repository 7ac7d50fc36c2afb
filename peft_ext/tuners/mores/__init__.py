"""MoReS: steer some visual tokens' hidden states in a small subspace (Bi et al., LLaVA Steering)."""

from ...hf.registration import register
from .config import MoReSConfig
from .layer import MoReSLayer
from .model import MoReSModel
from .visual_tokens import unfinished_prompt, visual_tokens


register("mores", MoReSConfig, MoReSModel)

__all__ = ["MoReSConfig", "MoReSLayer", "MoReSModel", "unfinished_prompt", "visual_tokens"]
