"""Change of meaning at some positions: Jaccard similarity of their top words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..cut.attention import AttentionKnockout
from ..cut.edges import check_mask, check_pairs, first_position
from ..cut.modules import MODULES, ModuleKnockout
from ..model.architecture import Architecture, inspect_model
from ..model.implementation import editable_attention
from ..model.threads import own_thread
from ..prompts.samples import last_positions
from ..sweep.clean_run import NotReusable, clean_run
from ..sweep.engines import ENGINES
from ..sweep.packed import Knock
from ..sweep.records import Record
from ..sweep.replay import replay
from ..sweep.windows import windows


POOLED = ("tokens", "positions")


@torch.no_grad()
def topk_jaccard(
    model: nn.Module,
    inputs: Mapping[str, Any],
    positions: Tensor,
    modules: Sequence[str] = MODULES,
    pairs: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    window: int = 9,
    mode: str | None = None,
    k: int = 10,
    pooled: str = "tokens",
    engine: str = "auto",
    names: Sequence[str] | None = None,
    info: Mapping[str, Any] | None = None,
) -> list[Record]:
    """
    Knock out modules at some positions, or pairs of token groups, in a window of each layer. Then compare the `k`
    words that are read from these positions after the last layer with those of the unchanged model:
    `|A ∩ B| / |A ∪ B|`.

    Paper: Zhang et al., [Cross-modal Information Flow in Multimodal Large Language
    Models](https://arxiv.org/abs/2411.18620), appendix.

    Args:
        model (`torch.nn.Module`):
            A decoder of transformers.
        inputs (`dict`):
            Arguments of the model.
        positions (`torch.Tensor`):
            Positions to read, bool `[batch, sequence]`: usually the question.
        modules (`list[str]`, *optional*):
            `"attention"` and/or `"mlp"`, knocked out at the positions.
        pairs (`dict[str, tuple[torch.Tensor, torch.Tensor]]`, *optional*):
            Pairs `(source, target)` by name.
        window (`int`, *optional*, defaults to 9):
            Number of layers per window.
        mode (`str`, *optional*):
            `"centred"` or `"forward"`; see [`windows`]. By default `"forward"` for modules and `"centred"` for pairs.
        k (`int`, *optional*, defaults to 10):
            Number of words per position.
        pooled (`str`, *optional*, defaults to `"tokens"`):
            What a set holds: the `"tokens"` of all positions, or pairs of `"positions"` and tokens.
        engine (`str`, *optional*, defaults to `"auto"`):
            As in [`layer_sweep`].
        names (`list[str]`, *optional*):
            Names of the rows, for the column `sample`.
        info (`dict`, *optional*):
            Further columns of the records.

    Returns:
        `list[dict]`: One record per row, intervention and layer, with `sample`, `intervention`, `layer`, `jaccard`.

    Raises:
        `ValueError`: If an argument is malformed; the message names it.
    """
    architecture = inspect_model(model)
    positions = check_mask(positions, "positions")
    tokens = inputs["input_ids"]
    if positions.shape != tokens.shape:
        raise ValueError(
            f"positions has the shape {tuple(positions.shape)}, but input_ids have {tuple(tokens.shape)}."
        )
    if pooled not in POOLED:
        raise ValueError(f'pooled is {pooled!r}: must be "tokens" or "positions".')
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k is {k!r}: must be a whole number of at least 1.")
    if engine != "auto" and engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}: must be auto, {', '.join(ENGINES)}.")
    vocabulary = architecture.vocabulary
    if k > vocabulary:
        raise ValueError(f"k is {k}, but the model has {vocabulary} words: give fewer.")
    rows = [str(row) for row in range(len(tokens))] if names is None else list(names)
    if len(rows) != len(tokens):
        raise ValueError(f"names must hold {len(tokens)} names, one per row, but holds {len(rows)}.")
    plan = _plan(architecture, positions, modules, pairs or {}, window, mode)
    if not plan:
        raise ValueError("modules and pairs are both empty: name an intervention.")
    knocks = [knock for _, _, knock in plan]
    states = None
    if engine != "full":
        try:
            states = _replayed(architecture, model, inputs, positions, knocks, engine)
        except NotReusable as reason:
            if engine != "auto":
                raise ValueError(f'engine="{engine}" would not be exact: {reason}. Use "full" or "auto".') from reason
    if states is None:
        states = _whole(architecture, model, inputs, knocks)
    clean, changed = states
    records: list[Record] = []
    before = _words(architecture, clean, positions, k, pooled)
    for (name, layer, _), hidden in zip(plan, changed, strict=True):
        after = _words(architecture, hidden, positions, k, pooled)
        records += [
            {
                "sample": rows[row],
                "intervention": name,
                "layer": layer,
                "jaccard": len(a & b) / len(a | b),
                **(info or {}),
            }
            for row, (a, b) in enumerate(zip(before, after, strict=True))
        ]
    return records


def _plan(
    architecture: Architecture,
    positions: Tensor,
    modules: Sequence[str],
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    window: int,
    mode: str | None,
) -> list[tuple[str, int, Knock]]:
    """Interventions by name and layer."""
    total, plan = len(architecture.layers), []
    first = first_position(positions)
    for module in [modules] if isinstance(modules, str) else modules:
        if module not in MODULES:
            raise ValueError(f'modules holds {module!r}: must be "attention" or "mlp".')
        for span in windows(total, window, mode or "forward"):
            plan.append((module, span.layer, Knock(first, span.start, span.end, positions=positions, module=module)))
    for name, pair in pairs.items():
        if name in MODULES:
            raise ValueError(f"pairs holds {name!r}, which is the name of a module: rename it.")
        edges = check_pairs([pair])[0]
        if edges.source.shape != positions.shape:
            raise ValueError(f"pairs[{name!r}] has the shape {tuple(edges.source.shape)}, positions another.")
        begin = first_position(edges.target)
        for span in windows(total, window, mode or "centred"):
            plan.append((name, span.layer, Knock(begin, span.start, span.end, edges=edges)))
    return plan


def _replayed(
    architecture: Architecture,
    model: nn.Module,
    inputs: Mapping[str, Any],
    positions: Tensor,
    knocks: list[Knock],
    engine: str,
) -> tuple[Tensor, list[Tensor]]:
    """States after the last layer, of the clean pass and the others; only those at `positions` count."""
    with editable_attention(architecture) as implementation:
        # from the first position that is read on, even where an intervention begins later
        targets = [*(knock.first for knock in knocks), first_position(positions)]
        run = clean_run(architecture, model, dict(inputs), last_positions(inputs), targets)
        moved = [replace(knock, first=run.firsts[knock.first]) for knock in knocks]
        found = dict(replay(architecture, run, moved, implementation, packed=engine != "suffix"))
    assert run.final is not None

    def whole(states: Tensor) -> Tensor:
        return torch.nn.functional.pad(states, (0, 0, run.start, 0))

    return whole(run.final), [whole(found[number]) for number in range(len(knocks))]


def _whole(
    architecture: Architecture, model: nn.Module, inputs: Mapping[str, Any], knocks: list[Knock]
) -> tuple[Tensor, list[Tensor]]:
    def run(knock: Knock | None) -> Tensor:
        seen: list[Tensor] = []

        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        with architecture.layers[-1].module.register_forward_hook(own_thread(see)), _context(model, knock):
            model(**inputs, use_cache=False)
        return seen[0][:, architecture.virtual_tokens :]

    return run(None), [run(knock) for knock in knocks]


def _context(model: nn.Module, knock: Knock | None) -> AbstractContextManager[Any]:
    if knock is None:
        return nullcontext()
    layers = range(knock.start, knock.end)
    if knock.edges is not None:
        return AttentionKnockout(model, layers, [(knock.edges.source, knock.edges.target)])
    assert knock.positions is not None
    return ModuleKnockout(model, layers, knock.positions, knock.module)


def _words(architecture: Architecture, states: Tensor, positions: Tensor, k: int, pooled: str) -> list[set[Any]]:
    """The top words of each row's positions. `states`: `[batch, tokens, D]`."""
    found: list[set[Any]] = []
    for row, mask in zip(states, positions.to(states.device), strict=True):
        best = architecture.logits(row[mask]).topk(k, dim=-1).indices.tolist()  # [positions, k]
        words = ((at, token) if pooled == "positions" else token for at, tokens in enumerate(best) for token in tokens)
        found.append(set(words))
    return found
