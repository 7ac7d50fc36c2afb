"""Windows of layers that are knocked out together, around each layer or from it on."""

from __future__ import annotations

from typing import NamedTuple


MODES = ("centred", "forward")


class Window(NamedTuple):
    """The layers that a knockout at one layer covers."""

    layer: int  # the layer that the result is reported for
    start: int  # the first layer of the window
    end: int  # the layer after its last


def windows(num_layers: int, size: int = 9, mode: str = "centred") -> list[Window]:
    """
    One window per layer, clipped to the model.

    Args:
        num_layers (`int`):
            Number of layers of the model.
        size (`int`, *optional*, defaults to 9):
            Number of layers per window. The paper uses 9; its code uses 7 for models of 32 layers.
        mode (`str`, *optional*, defaults to `"centred"`):
            `"centred"`: around the layer; the larger half of an even window comes before it. `"forward"`: from the
            layer on.

    Raises:
        `ValueError`: If `size` or `num_layers` is less than 1, or `mode` is neither.
    """
    for name, value in (("num_layers", num_layers), ("window", size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}: must be a whole number of at least 1.")
    if mode not in MODES:
        raise ValueError(f'mode is {mode!r}: must be "centred" or "forward".')
    before, after = (size // 2, (size + 1) // 2) if mode == "centred" else (0, size)
    return [Window(at, max(0, at - before), min(num_layers, at + after)) for at in range(num_layers)]
