"""Which entries of a weight to train: a criterion (what to rank by) within a scope (who competes with whom)."""

from .criteria import Criterion
from .plan import SELECTIONS, parse_selection, select_supports
from .scopes import top_overall, top_per_neuron


__all__ = ["SELECTIONS", "Criterion", "parse_selection", "select_supports", "top_overall", "top_per_neuron"]
