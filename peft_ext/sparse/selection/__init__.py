"""Selection of the trained entries: a criterion ranks them within a scope (a neuron, a layer or the network)."""

from .criteria import Criterion
from .given import ScoreMatrices
from .plan import SCORED, SELECTIONS, parse_selection, select_supports
from .scopes import top_overall, top_per_neuron


__all__ = [
    "SCORED",
    "SELECTIONS",
    "Criterion",
    "ScoreMatrices",
    "parse_selection",
    "select_supports",
    "top_overall",
    "top_per_neuron",
]
