"""Where information flows in a decoder: knock out attention edges or modules and see what the answer loses."""

from .attention import AttentionKnockout
from .modules import ModuleKnockout
from .norms import image_token_norms
from .records import read_records
from .samples import FlowSample
from .sweep import layer_sweep
from .token_groups import find_token_groups
from .windows import windows


__all__ = [
    "AttentionKnockout",
    "FlowSample",
    "ModuleKnockout",
    "find_token_groups",
    "image_token_norms",
    "layer_sweep",
    "read_records",
    "windows",
]
