"""All public names of `peft_ext`. Importing this file registers the methods with PEFT and transformers."""

from ._version import __version__
from .conversion import convert
from .install.wrappers import install as _install
from .sparse.another_base import another_base
from .sparse.choose.scoring import (
    SupervisedContrastiveLoss,
    TwoViewCollator,
    activation_scores,
    busiest_experts,
    gradient_scores,
)
from .sparse.layers.scaling import rescale_adapter_scale, set_scale
from .sparse.model.hotswap import hotswap_adapter
from .sparse.report.selection_report import SelectionReport, selection_report
from .tuners.gps import GPS_PRESETS, GPSConfig, GPSModel, gps
from .tuners.mores import MoReSConfig, MoReSModel, unfinished_prompt, visual_tokens
from .tuners.neuroada import NEUROADA_PRESETS, NEUROADA_SEARCH_SPACES, NeuroAdaConfig, NeuroAdaModel
from .tuners.psn import PSNConfig, PSNModel


_install()

__all__ = [
    "GPS_PRESETS",
    "NEUROADA_PRESETS",
    "NEUROADA_SEARCH_SPACES",
    "GPSConfig",
    "GPSModel",
    "MoReSConfig",
    "MoReSModel",
    "NeuroAdaConfig",
    "NeuroAdaModel",
    "PSNConfig",
    "PSNModel",
    "SelectionReport",
    "SupervisedContrastiveLoss",
    "TwoViewCollator",
    "__version__",
    "activation_scores",
    "another_base",
    "busiest_experts",
    "convert",
    "gps",
    "gradient_scores",
    "hotswap_adapter",
    "rescale_adapter_scale",
    "selection_report",
    "set_scale",
    "unfinished_prompt",
    "visual_tokens",
]
