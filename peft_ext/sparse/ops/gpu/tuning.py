"""Which of a few kernel configurations runs: measured once per kind of call, then remembered.

Sizes enter the key as they are, the number of tokens as a bucket: neither decoding nor batches of many lengths measure
again. The first configuration runs unmeasured
- while a CUDA graph is captured (measuring would synchronise), and from then on, so that calls outside of the graph
  give the bits of those inside;
- under `torch.use_deterministic_algorithms` (another configuration sums in another order);
- where memory is too short to measure in; the next call tries again.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch


TOKEN_BUCKETS = (1, 16, 128, 1024, 8192)
ROUNDS, LAUNCHES = 5, 4


@dataclass(frozen=True)
class Config:
    """Block sizes of a kernel. `block_tokens` is 0 for the kernels that stage rows in shared memory."""

    block_tokens: int
    block_neurons: int  # or entries, for the gradient of the values
    block_k: int = 1  # entries of a neuron in one round, or of all neurons (staged, uneven)
    num_warps: int = 4
    columns_first: bool = False  # a direct kernel over a copy of x in which the tokens of a column are neighbours

    @property
    def staged(self) -> bool:
        return self.block_tokens == 0


_chosen: dict[Hashable, Config] = {}


def bucket(tokens: int) -> int:
    """The smallest bucket that holds so many tokens."""
    return next((size for size in TOKEN_BUCKETS if tokens <= size), 2 * TOKEN_BUCKETS[-1])


def choice(
    key: Hashable,
    candidates: Callable[[], Sequence[Config]],
    device: torch.device,
    trial: Callable[[], Callable[[Config], None]],
) -> Config:
    """
    The fastest of the configurations.

    Args:
        key: what the choice is remembered by.
        candidates: gives the configurations; the first is the one to run where nothing can be measured.
        device: of the tensors.
        trial: makes a function that does the whole work with one configuration, any number of times.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    if key in _chosen and not deterministic:
        return _chosen[key]
    configs = candidates()
    if len(configs) == 1 or deterministic or not can_measure(device):
        return configs[0]
    if torch.cuda.is_current_stream_capturing():
        _chosen[key] = configs[0]
        return configs[0]
    try:
        _chosen[key] = fastest(configs, trial(), lambda do: milliseconds(do, device))
    except torch.OutOfMemoryError:
        return configs[0]
    return _chosen[key]


def can_measure(device: torch.device) -> bool:
    """Whether the device has a clock for its work."""
    return device.type == "cuda"


def fastest(
    configs: Sequence[Config], launch: Callable[[Config], None], time: Callable[[Callable[[], None]], float]
) -> Config:
    """The configuration with the shortest time; those that need more than the device has (shared memory) drop out."""
    from triton.runtime.errors import OutOfResources, PTXASError

    times: dict[Config, float] = {}
    for config in configs:
        try:
            times[config] = time(lambda config=config: launch(config))  # type: ignore[misc]
        except (OutOfResources, PTXASError):
            continue
    return min(times, key=times.__getitem__, default=configs[0])


def milliseconds(do: Callable[[], None], device: torch.device) -> float:
    """Median of some rounds, each of several launches in a row, so that the queue does not run dry between them."""
    do()  # compiles
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(LAUNCHES):
            do()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / LAUNCHES)
    return statistics.median(times)
