"""Where information flows in a decoder: knock out attention edges or modules and see what the answer loses."""

from .cut.attention import AttentionKnockout
from .cut.modules import ModuleKnockout
from .page import Report, SampleView, report, sample_view
from .plots import plot_answer_probability, plot_jaccard, plot_sweep, plot_token_map
from .prompts.samples import FlowSample, LazySample
from .prompts.token_groups import find_token_groups
from .read.jaccard import topk_jaccard
from .read.lens import RidgeLens, answer_probability_by_layer, answer_tokens, residual_stream
from .read.modality import lmar
from .read.modality_plots import plot_modality
from .read.norms import image_token_norms
from .sweep.patch_effects import patch_effects
from .sweep.records import read_records
from .sweep.sweep import layer_sweep
from .sweep.windows import windows


__all__ = [
    "AttentionKnockout",
    "FlowSample",
    "LazySample",
    "ModuleKnockout",
    "Report",
    "RidgeLens",
    "SampleView",
    "answer_probability_by_layer",
    "answer_tokens",
    "find_token_groups",
    "image_token_norms",
    "layer_sweep",
    "lmar",
    "patch_effects",
    "plot_answer_probability",
    "plot_jaccard",
    "plot_modality",
    "plot_sweep",
    "plot_token_map",
    "read_records",
    "report",
    "residual_stream",
    "sample_view",
    "topk_jaccard",
    "windows",
]
