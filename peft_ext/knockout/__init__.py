"""Where information flows in a decoder: knock out attention edges or modules and see what the answer loses."""

from .attention import AttentionKnockout
from .modules import ModuleKnockout
from .records import read_records
from .samples import FlowSample
from .sweep import layer_sweep
from .windows import windows


__all__ = ["AttentionKnockout", "FlowSample", "ModuleKnockout", "layer_sweep", "read_records", "windows"]
