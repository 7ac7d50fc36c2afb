"""Fine-grained sparse tuning as PEFT methods. Importing the package registers them with PEFT and transformers."""

from ._version import __version__
from .registration import make_loading_all_or_nothing, make_saving_atomic
from .sparse.hotswap import hotswap_adapter
from .tuners.mores import MoReSConfig, MoReSModel, visual_tokens
from .tuners.neuroada import NEUROADA_PRESETS, NEUROADA_SEARCH_SPACES, NeuroAdaConfig, NeuroAdaModel


make_loading_all_or_nothing()
make_saving_atomic()

__all__ = [
    "NEUROADA_PRESETS",
    "NEUROADA_SEARCH_SPACES",
    "MoReSConfig",
    "MoReSModel",
    "NeuroAdaConfig",
    "NeuroAdaModel",
    "__version__",
    "hotswap_adapter",
    "visual_tokens",
]
