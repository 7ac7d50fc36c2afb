"""Where information flows in a decoder: knock out attention edges or modules and see what the answer loses."""

from .attention import AttentionKnockout
from .modules import ModuleKnockout
from .windows import windows


__all__ = ["AttentionKnockout", "ModuleKnockout", "windows"]
