"""Where information flows in a decoder: knock out attention edges or modules and see what the answer loses."""

from .attention import AttentionKnockout
from .jaccard import topk_jaccard
from .lens import RidgeLens, answer_probability_by_layer, answer_tokens, residual_stream
from .modality import lmar
from .modality_plots import plot_modality
from .modules import ModuleKnockout
from .norms import image_token_norms
from .plots import plot_answer_probability, plot_jaccard, plot_sweep, plot_token_map
from .records import read_records
from .samples import FlowSample, LazySample
from .sweep import layer_sweep
from .token_groups import find_token_groups
from .windows import windows


__all__ = [
    "AttentionKnockout",
    "FlowSample",
    "LazySample",
    "ModuleKnockout",
    "RidgeLens",
    "answer_probability_by_layer",
    "answer_tokens",
    "find_token_groups",
    "image_token_norms",
    "layer_sweep",
    "lmar",
    "plot_answer_probability",
    "plot_jaccard",
    "plot_modality",
    "plot_sweep",
    "plot_token_map",
    "read_records",
    "residual_stream",
    "topk_jaccard",
    "windows",
]
