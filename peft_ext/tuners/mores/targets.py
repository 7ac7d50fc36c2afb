"""Modules that an adapter steers."""

from __future__ import annotations

from .architecture import Architecture
from .config import MoReSConfig


def targets_of(config: MoReSConfig, architecture: Architecture) -> set[str]:
    """
    The names of the modules that an adapter steers: those of its file, else by its options.

    Raises:
        `ValueError`: if the model lacks what the options or the file ask for.
    """
    by_options = _by_options(config, architecture)
    if config.target_modules is None:
        return by_options
    known = set(architecture.layers)
    if architecture.connector is not None and architecture.connector.linear is not None:
        known.add(architecture.connector.linear)
    unknown = sorted(set(config.target_modules) - known)
    if unknown:
        raise ValueError(
            f"target_modules has '{unknown[0]}', which is no place that MoReS can steer in this {architecture.kind}; "
            f"it has {', '.join(sorted(known))}. Leave target_modules out, or load the adapter onto the model it was "
            "trained on."
        )
    return set(config.target_modules)


def _by_options(config: MoReSConfig, architecture: Architecture) -> set[str]:
    kind = architecture.kind
    if config.site == "connector":
        if architecture.connector is None:
            raise ValueError(f"site='connector', but no connector was found in {kind}; use site='layers'.")
        if architecture.connector.linear is None:
            raise ValueError(
                f"site='connector', but {kind}'s connector '{architecture.connector.name}' has no linear layer to "
                "steer; use site='layers'."
            )
        return {architecture.connector.linear}
    if config.token_positions is None and not architecture.visual_token_ids:
        raise ValueError(
            f"{kind} has no visual tokens: its config has no image_token_id. Pass token_positions, such as 'f7+l7', "
            "to steer text."
        )
    names = list(architecture.layers)
    layers = config.layers_to_transform
    if layers is None and config.token_positions is None:
        names.pop()  # no output depends on visual tokens after the last layer
        if not names:
            raise ValueError(
                f"{kind} has one decoder layer, after which visual tokens reach no output. Pass site='connector', or "
                "layers_to_transform='all' if something else reads that layer's output."
            )
    elif isinstance(layers, (int, list)):
        numbers = [layers] if isinstance(layers, int) else layers
        for number in numbers:
            if not -len(names) <= number < len(names):
                raise ValueError(f"layers_to_transform has {number}, but {kind} has {len(names)} layers, from 0.")
        names = [names[number] for number in numbers]
    return set(names)
