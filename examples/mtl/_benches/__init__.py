"""Three multi-task problems that are computed, not downloaded."""

from .digits import DIGITS
from .scenes import SCENES
from .sprites import SPRITES


BENCHES = {bench.name: bench for bench in (DIGITS, SPRITES, SCENES)}
