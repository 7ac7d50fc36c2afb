"""Options that all sparse tuners share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from typing_extensions import Self

from ..hf.config import SavedConfig
from ..hf.internals import get_pattern_key
from .checks import check_count, check_flag, check_share
from .ops import BACKENDS
from .selection.plan import parse_selection
from .support import Support


VALUES_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class SparseConfig(SavedConfig):
    """The options that all sparse tuners share; [`NeuroAdaConfig`], [`GPSConfig`] and [`PSNConfig`] explain them."""

    peft_type: Any = field(default=None, metadata={"help": "Set by each method."})
    k: int | None = field(default=1, metadata={"help": "Trained entries per neuron, capped at the fan-in."})
    k_pattern: dict[str, int] | None = field(default=None, metadata={"help": "k of some modules, by name or regex."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names (by suffix), a regex, 'all-linear', 'all-neurons', or None."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    selection: str = field(default="magnitude", metadata={"help": "How the trained entries are chosen."})
    neuron_ratio: float = field(default=1.0, metadata={"help": "Share of neurons that get trained entries."})
    column_budget: int | None = field(default=None, metadata={"help": "Inputs per weight that neurons choose among."})
    seed: int = field(default=0, metadata={"help": "Seed of random choices."})
    backend: str = field(default="auto", metadata={"help": "auto, bypass, folded, dense or reference."})
    values_dtype: str | None = field(default=None, metadata={"help": "float32, bfloat16, float16, or None."})
    bias: str = field(default="none", metadata={"help": "Biases to train: none, all, or <method>_only."})
    train_bias: bool = field(default=False, metadata={"help": "Train the adapted layers' biases with the adapter."})
    init_weights: bool = field(default=True, metadata={"help": "Start from zero (True) or random values (False)."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Block numbers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained too."}
    )
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Weights of fused experts."})
    experts_to_transform: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Numbers of the experts to adapt, of all modules or by their names."}
    )
    expert_weights: list[str] | None = field(default=None, metadata={"help": "Filled in; adapted weights of experts."})
    support_sizes: dict[str, int] | None = field(default=None, metadata={"help": "Filled in; entries per module."})

    def __post_init__(self) -> None:
        super().__post_init__()
        # No fields: they live only until an adapter has its entries. Scores to rank by, or per module the entries
        # themselves, chosen elsewhere.
        self.scores: Mapping[str, Tensor] | None = None
        self.supports: Mapping[str, Support] | None = None
        self._check()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))

    def _check(self) -> None:
        self._check_size()
        self._check_names()
        if self.target_parameters is not None and not _is_list_of(str, self.target_parameters):
            raise ValueError(
                f"target_parameters={self.target_parameters!r} must be a list of names, such as "
                "['experts.gate_up_proj']."
            )
        by_module = self.experts_to_transform
        chosen = by_module.values() if isinstance(by_module, dict) else [by_module] if by_module is not None else []
        if not all(_is_list_of(int, numbers) for numbers in chosen):
            raise ValueError(
                f"experts_to_transform={by_module!r} must be a list of experts' numbers, or one such list for each "
                "module's name."
            )
        for name, what in (("layers_to_transform", "numbers"), ("layers_pattern", "name")):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} works with a list of target_modules, not with "
                    f"{self.target_modules!r}; put the layers' {what} into the regex."
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} is set but layers_to_transform is not; set both or neither."
            )
        _, scope = parse_selection(self.selection)
        check_flag("train_bias", self.train_bias)
        if type(self.seed) is not int:
            raise ValueError(f"seed={self.seed!r} must be a whole number.")
        if type(self.init_weights) is not bool:
            raise ValueError(f"init_weights={self.init_weights!r} must be True (zeros) or False (random values).")
        check_share("neuron_ratio", self.neuron_ratio, "neurons that get entries")
        if self.neuron_ratio != 1.0 and scope != "neuron":
            raise ValueError(f"neuron_ratio={self.neuron_ratio} needs a selection per neuron, not {self.selection!r}.")
        self._check_pattern()
        self._check_budget(scope)
        if self.backend not in BACKENDS:
            raise ValueError(f"backend={self.backend!r} is not known; choose one of {', '.join(BACKENDS)}.")
        if self.values_dtype is not None and self.values_dtype not in VALUES_DTYPES:
            raise ValueError(f"values_dtype={self.values_dtype!r} must be None or one of {', '.join(VALUES_DTYPES)}.")
        method = str(getattr(self.peft_type, "value", self.peft_type) or "").lower()
        if self.bias not in ("none", "all", f"{method}_only"):
            raise ValueError(f"bias={self.bias!r} must be 'none', 'all' or '{method}_only'.")

    def _check_budget(self, scope: str) -> None:
        if self.column_budget is None:
            return
        check_count("column_budget", self.column_budget, ": inputs that the neurons of a weight choose among")
        if scope != "neuron":
            raise ValueError(
                f"column_budget={self.column_budget} needs a selection per neuron, not {self.selection!r}."
            )
        largest = max([self.k or 0, *(self.k_pattern or {}).values()])
        if largest > self.column_budget:
            raise ValueError(
                f"k={largest} entries per neuron can't be chosen among column_budget={self.column_budget} inputs; "
                "lower k or raise column_budget."
            )

    def _check_pattern(self) -> None:
        if self.k_pattern is None:
            return
        if not isinstance(self.k_pattern, dict):
            raise ValueError(f"k_pattern={self.k_pattern!r} must be a dict from names of modules to k.")
        for pattern, k in self.k_pattern.items():
            check_count(f"k_pattern[{pattern!r}]", k, ": entries trained per neuron")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"k_pattern has {pattern!r}, which is no regular expression ({error}).") from error

    def _check_size(self) -> None:
        check_count("k", self.k, ": entries trained per neuron")

    def _check_names(self) -> None:
        if self.target_modules is not None and not self.target_modules:
            raise ValueError(
                f"target_modules={self.target_modules!r} adapts nothing; name modules, or leave it out to adapt all "
                "linear layers."
            )
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str) or _is_list_of(str, value)):
                raise ValueError(f"{name}={value!r} must be a list of names of modules, or a regular expression.")
            try:
                re.compile(value if isinstance(value, str) else "")
            except re.error as error:
                raise ValueError(
                    f"{name}={value!r} is no regular expression ({error}); pass a list to give names."
                ) from error
        if not (self.modules_to_save is None or _is_list_of(str, self.modules_to_save)):
            raise ValueError(f"modules_to_save={self.modules_to_save!r} must be a list of names of modules.")
        numbers = self.layers_to_transform
        if not (numbers is None or _is_list_of(int, numbers) or _is_list_of(int, [numbers])):
            raise ValueError(f"layers_to_transform={numbers!r} must be a block's number, or a list of them.")

    def pattern_of(self, module: str) -> str | None:
        """The key of `k_pattern` that a module has its k from, if any."""
        found = get_pattern_key(list(self.k_pattern or {}), module)
        return found if found in (self.k_pattern or {}) else None

    def entries_per_neuron(self, fan_in: int, module: str = "") -> int:
        """Number of entries that a neuron with `fan_in` inputs gets."""
        pattern = self.pattern_of(module)
        k = self.k if pattern is None or self.k_pattern is None else self.k_pattern[pattern]
        return self._within_budget(min(k or 0, fan_in))

    def _within_budget(self, entries: int) -> int:
        return entries if self.column_budget is None else min(entries, self.column_budget)

    def for_supports(self, supports: Mapping[str, Support], **changes: Any) -> Self:
        """
        A copy that gives an adapter these entries, per module, and leads to their shapes again when it is loaded:
        through `k` where all are tables of one width, else with all of them made ragged and their sizes listed.
        """
        k = max((s.indices.shape[1] for s in supports.values() if s.is_table), default=0)
        if k and all(s.is_table and s.indices.shape[1] == min(k, s.fan_in) for s in supports.values()):
            copy = replace(self.as_table(k), support_sizes=None, peft_ext_version=None, **changes)
            copy.supports = supports
            return copy
        ragged = {name: support.ragged() for name, support in supports.items()}
        sizes = {name: support.entries for name, support in ragged.items()}
        copy = replace(self, support_sizes=sizes, column_budget=None, k_pattern=None, peft_ext_version=None, **changes)
        copy.supports = ragged
        return copy

    def as_table(self, k: int) -> Self:
        """A copy that leads to tables of exactly `k` entries per neuron."""
        return replace(self, k=k, selection="magnitude", neuron_ratio=1.0, column_budget=None, k_pattern=None)

    def with_scores(self, scores: Mapping[str, Tensor]) -> Self:
        """
        Pass the scores for `selection="gradient"` and `selection="activation"`.

        Args:
            scores (`dict[str, torch.Tensor]`):
                Per module name, a tensor in the shape of the module's weight, such as its gradient. Entries are ranked
                by magnitude, so the sign does not matter. Any mapping works; each score is read when its module is
                adapted.

        Returns:
            The config itself, to be passed to `get_peft_model`.
        """
        if not isinstance(scores, Mapping):
            raise ValueError(f"scores={scores!r} must be a mapping from the names of modules to tensors.")
        self.scores = scores
        return self


def _is_list_of(kind: type, value: Any) -> bool:
    """Whether a value is a list, tuple or set of one type exactly: True is no number."""
    return isinstance(value, (list, tuple, set)) and all(type(item) is kind for item in value)
