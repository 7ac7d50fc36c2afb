"""From the weights of an adapter's targets to one support per weight: chosen, given, or awaited."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...hf.internals import QuantizationBackend
from ..bases.neurons import check_real, experts_of, matrix_shape, neuron_view, parameter_of
from ..bases.quantised import float_weight, has_data, is_readable
from ..bases.sharded import check_gatherable
from ..bases.sharing import identity, weight_key
from ..config import SparseConfig
from ..memory import Region
from ..selection.given import given_scores, uncompiled
from ..selection.plan import SCORED, parse_selection, select_supports
from ..support import Support
from .by_expert import ExpertMatrices
from .placeholders import placeholder, support_from


Backends = Mapping[str, QuantizationBackend | None]


@dataclass
class Planned:
    """A weight's support; `pending` if it is a placeholder until a checkpoint is loaded."""

    support: Support
    pending: bool = False


def plan(
    config: SparseConfig,
    targets: Mapping[str, Any],
    *,
    backends: Backends,
    originals: Mapping[Hashable, Callable[[], Tensor]],
    tables: Mapping[str, dict[str, Tensor]],
    awaits: bool = False,
    empty: bool = False,
) -> dict[str, Planned]:
    """
    Check the weights of an adapter's targets, and choose their entries. Where a checkpoint or a state dict brings the
    entries, only their shapes are planned.

    Args:
        config ([`SparseConfig`]):
            The options. Sizes that injecting the adapter again takes are noted in it: `expert_weights` and
            `support_sizes`.
        targets (`dict`): base layers with one weight each, by name.
        backends (`dict`): PEFT's access to their weights, `None` for those that are not quantised.
        originals (`dict`): for each layer with merged adapters, by its [`identity`], a function that returns its
            weight without them, as `[rows, fan_in]`.
        tables (`dict`): the entries that a state dict gives, by the name of their module.
        awaits (`bool`, *optional*, defaults to `False`): a checkpoint or a state dict brings the entries.
        empty (`bool`, *optional*, defaults to `False`): the supports are made without memory, on the meta device.

    Raises:
        `TypeError`: if a weight is not of real numbers, or can't be read.
        `ValueError`: if a weight is not finite, or scores are missing or of another shape.
    """
    config.expert_weights = sorted(name for name, base in targets.items() if experts_of(base)) or None
    if config.supports is not None:
        return {name: Planned(config.supports[name]) for name in targets}
    sources = _sources(targets)
    _check_biases(config, targets, sources)
    for name, base in targets.items():
        if backends[name] is None:
            check_gatherable(name, parameter_of(base), *matrix_shape(base))
            check_real(name, parameter_of(base))
    _check_scores(config, awaits)
    no_data = empty or not all(map(has_data, targets.values()))
    if awaits or no_data:  # a checkpoint brings the entries, or there is nothing to choose from
        return {name: _awaited(config, name, base, tables, no_data) for name, base in targets.items()}
    _check_readable(config, targets, backends)
    _check_pattern(config, targets)
    supports = _choose(config, {name: targets[name] for name in sources.values()}, backends, originals)
    is_wide = parse_selection(config.selection)[1] == "network"
    config.support_sizes = {name: supports[sources[name]].entries for name in targets} if is_wide else None
    return {name: Planned(supports[sources[name]]) for name in targets}


def _sources(targets: Mapping[str, Any]) -> dict[str, str]:
    """For each target, the first one with the same weight: layers that share a weight share their entries."""
    first: dict[Hashable, str] = {}
    return {name: first.setdefault(weight_key(base) or name, name) for name, base in targets.items()}


def _check_biases(config: SparseConfig, targets: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    for name, source in sources.items() if config.train_bias else ():
        biases = [getattr(targets[layer], "bias", None) for layer in (name, source)]
        ours, theirs = (None if bias is None else Region.of(bias) for bias in biases)
        if name != source and ours != theirs:
            raise ValueError(
                f"'{source}' and '{name}' share a weight, so they share what an adapter trains, but their "
                "biases differ. Set train_bias=False, or adapt only one of the two."
            )


def _check_scores(config: SparseConfig, awaits: bool) -> None:
    criterion, _ = parse_selection(config.selection)
    if criterion in SCORED and config.scores is None and not awaits:
        raise ValueError(
            f"selection={config.selection!r} needs scores. Load a saved adapter with PeftModel.from_pretrained. "
            "For a new one, compute them before the model is adapted:\n"
            f"    scores = peft_ext.{criterion}_scores(model, dataloader)\n"
            "    model = get_peft_model(model, config.with_scores(scores))"
        )


def _check_readable(config: SparseConfig, targets: Mapping[str, Any], backends: Backends) -> None:
    if parse_selection(config.selection)[0] in SCORED:
        return
    for name, backend in backends.items():
        if backend is not None and not is_readable(targets[name], backend):
            raise TypeError(
                f"Target module '{name}' is quantised by {backend.backend_name}, which can't give its weights back, "
                "so no entries can be ranked. Choose them on the unquantised model, save that adapter, and load it "
                "here."
            )


def _check_pattern(config: SparseConfig, names: Iterable[str]) -> None:
    unused = sorted({*(config.k_pattern or {})} - {config.pattern_of(name) for name in names})
    if unused:
        raise ValueError(f"k_pattern has {unused[0]!r}, which fits no adapted module; mend it or leave it out.")


def _awaited(
    config: SparseConfig, name: str, base: Any, tables: Mapping[str, dict[str, Tensor]], no_data: bool
) -> Planned:
    """Plan for a weight whose entries are about to be loaded."""
    given = tables.get(uncompiled(name), {})
    is_given = "indices" in given
    support = support_from(given, config, name, base) if is_given else placeholder(config, name, base)
    return Planned(support.to("meta" if no_data else "cpu"), not is_given or given["indices"].is_meta or no_data)


def _choose(
    config: SparseConfig,
    targets: Mapping[str, Any],
    backends: Backends,
    originals: Mapping[Hashable, Callable[[], Tensor]],
) -> dict[str, Support]:
    """The supports of weights that are all different. Of experts, each one's matrix is a weight of its own."""
    by_expert = ExpertMatrices(targets, config)
    views = {  # an adapter is chosen for the base weight, not for what is merged into it at the moment
        name: originals.get(identity(base)) or partial(_matrix, base, backends[name]) for name, base in targets.items()
    }
    scores = None
    if parse_selection(config.selection)[0] in SCORED:
        scores = by_expert.split(given_scores(config.scores or {}, targets))
    supports = select_supports(
        by_expert.split(views),
        config.selection,
        lambda fan_in, key: config.entries_per_neuron(fan_in, by_expert.origin.get(key, (key,))[0]),
        config.neuron_ratio,
        config.seed,
        scores,
        config.column_budget,
    )
    return by_expert.join(supports)


def _matrix(base_layer: nn.Module, backend: QuantizationBackend | None) -> Tensor:
    return neuron_view(base_layer, float_weight(base_layer, backend))
