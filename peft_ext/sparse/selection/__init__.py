"""Which entries of a weight to train: a criterion (what to rank by) within a scope (who competes with whom)."""

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
