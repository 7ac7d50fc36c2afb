"""The three products of a sparse update as launches of the Triton kernels. Import this module only where Triton is."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...support import row_of_entry
from . import direct, staged, triton_version, tuning
from .tuning import Config


# Words of 8 bytes that fit in the shared memory of a multiprocessor (227 KB on H100, 163 KB on A100); smaller devices
# refuse at launch and fall back on the other configurations.
MAX_STAGED_WIDTH = 16384
# With Triton 3.3, `gather_sum_staged` at 14336 inputs compiles for a minute and a half and spills 8 KB per thread.
STAGED_SINCE = (3, 4)
# A value gradient splits the tokens until it has so many programs of that size (an H100 runs some 300 at once), but
# not below a span where writing and summing the parts would cost more than reading the activations. The parts together
# take at most 16 MB.
PROGRAMS = 1024
PROGRAM_ENTRIES = 4096
MIN_SPAN = 32
# Words of a thread that a staged value gradient loads ahead: more would leave registers for fewer programs.
WORDS_AHEAD = 8
# Entries of a neuron that are summed side by side with those of others; a multiple of every `block_k`. Kernels that
# read columns first take some more than the mean, for their rounds are short.
LIGHT = 32
# From so many tokens on a transposed copy of x may pay. H100, bf16, 4096 tokens, 4096→14336, k=20, forward and input
# gradient: 0.79 and 2.0 ms with one, 1.55 and 7.6 ms without; k=1: 0.23 and 0.54 with one, 0.11 and 0.47 without.
COLUMNS_FIRST_TOKENS = 128
TRANSPOSE_BLOCK = 64


def power_of_two(size: int, most: int = 2**30) -> int:
    """The next power of two, but no more than `most` (one itself)."""
    return min(most, 1 << max(0, size - 1).bit_length())


def sum_configs(tokens: int, neurons: int, width: int, k: int, itemsize: int, uneven: bool) -> list[Config]:
    """
    Candidates for `gather_sum`; `k` is the mean number of entries per neuron, rounded up.

    `uneven`: some neurons may have many more (an input that most neurons chose, in a transposed table). The choice is
    remembered for other layers of these sizes, which may be more uneven, so each kind bounds what that costs. Direct
    ones: at most `light_of` entries side by side, then rounds that serve one neuron, so below `1 + 1 / LIGHT` rounds
    per entry. Staged ones: rounds that serve entries, whoever owns them, so the same number for every layer but for
    one or two per program.
    """
    block_k = power_of_two(k, 8)

    def neurons_of(entries: int) -> int:
        return power_of_two(neurons, max(16, entries // block_k))

    configs = [Config(power_of_two(tokens, 16), neurons_of(128), block_k)]
    if tokens > 4:
        configs.append(Config(4, neurons_of(512), block_k))
        if _can_stage(width, itemsize) and uneven:
            configs += [Config(0, *blocks) for blocks in _uneven_blocks(width)]
        elif _can_stage(width, itemsize):
            blocks = _staged_blocks(width, block_k)
            configs += [Config(0, neurons_of(entries), block_k, warps) for entries, warps in blocks]
    if tokens >= COLUMNS_FIRST_TOKENS and (uneven or k > 1):
        configs.append(Config(128, power_of_two(neurons, 16 if uneven else 32), columns_first=True))
    return list(dict.fromkeys(configs))  # few neurons make some of them equal


def light_of(config: Config, k: int) -> int:
    """Entries of a neuron that are summed side by side; `k` as in `sum_configs`."""
    return max(LIGHT, power_of_two(k + k // 2)) if config.columns_first else LIGHT


def value_configs(tokens: int, entries: int, width: int, itemsize: int) -> list[Config]:
    """Candidates for `grad_values`."""
    configs = [Config(power_of_two(tokens, 16), power_of_two(entries, 128))]
    if tokens > 4:
        configs.append(Config(4, power_of_two(entries, 512)))
        for most, warps in _value_blocks(width, entries) if _can_stage(width, itemsize) else ():
            configs.append(Config(0, power_of_two(entries, most), 1, warps))
    return list(dict.fromkeys(configs))


def _staged_blocks(width: int, block_k: int) -> list[tuple[int, int]]:
    """
    Entries and warps of staged programs: about as many entries as words, since each gather stages all words, and no
    more than registers hold (`tests/sparse/ops/gpu/test_targets.py` compiles them).
    """
    if width <= 4096:
        return [(2048, 8), (4096, 8)]
    return [(4096 if block_k == 1 else 2048, 16)]


def _uneven_blocks(width: int) -> list[tuple[int, int, int]]:
    """Neurons of a staged program, entries of one of its rounds, and warps, as above."""
    return [(1024, 1024, 8), (2048, 2048, 8)] if width <= 4096 else [(1024, 2048, 16)]


def _value_blocks(width: int, entries: int) -> list[tuple[int, int]]:
    """Entries of a staged program of a value gradient, and warps, as above; larger ones stage the rows less often."""
    if width > 4096:
        return [(4096, 16)]
    return [(2048, 8), (4096, 8)] if entries <= 4096 else [(4096, 8), (8192, 16)]


def _can_stage(width: int, itemsize: int) -> bool:
    return width <= MAX_STAGED_WIDTH and itemsize in (2, 4) and triton_version() >= STAGED_SINCE


def splits_of(tokens: int, entries: int) -> tuple[int, int]:
    """
    How the tokens of a value gradient are split: number of parts, tokens of each.

    It depends on the sizes alone, not on what was measured.
    """
    blocks = -(-entries // PROGRAM_ENTRIES)
    parts = max(1, min(PROGRAMS // blocks, tokens // MIN_SPAN))
    span = -(-tokens // parts)
    span += -span % 16  # whole blocks of tokens
    return -(-tokens // span), span


def unstaged(configs: list[Config]) -> list[Config]:
    """Those that can run over experts: a word of staged tokens may be several experts'."""
    return [config for config in configs if not config.staged]


def tiles_of(tokens: int, experts: int, block_tokens: int) -> int:
    """Most tiles that the tokens of experts, and those of none, can fall into, whatever the loads."""
    return min(tokens, tokens // block_tokens + experts + 1)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def rows_of(indices: Tensor, offsets: Tensor | None) -> Tensor | None:
    """int32 row of each entry of a ragged support; the kernels compute that of a table."""
    return None if offsets is None else row_of_entry(indices, offsets).to(torch.int32)


def columns_first(x: Tensor) -> Tensor:
    """A copy of `[tokens, width]` in which the tokens of a column are neighbours, each column aligned."""
    tokens, width = x.shape
    copy = x.new_empty(width, tokens + -tokens % 16)
    grid = (-(-tokens // TRANSPOSE_BLOCK) * -(-width // TRANSPOSE_BLOCK),)
    direct.transposed[grid](x, copy, tokens, width, *x.stride(), copy.stride(0), BLOCK=TRANSPOSE_BLOCK, num_warps=4)
    return copy[:, :tokens].t()


def _flat(table: Tensor) -> Tensor:
    """One number after the other, as the kernels read values and indices: `reshape` alone keeps strides of slices."""
    return table.reshape(-1).contiguous()


def _dtypes(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)


def gather_sum(
    base: Tensor | None, x: Tensor, values: Tensor, columns: Tensor | None, offsets: Tensor | None,
    entries: Tensor | None, owners: Callable[[], Tensor | None] | None, k: int, out: Tensor,
    ends: Tensor | None = None,
) -> None:  # fmt: skip
    """
    `out = base + gathered sums of x`, see `direct.gather_sum`. `out` (`[tokens, neurons]`) may be `base` itself: each
    element is read and written once, by one program. Measuring writes elsewhere, since repeating would add again.
    `owners`, with `offsets`: makes an int32 tensor of the neurons that entries belong to. `ends`, int32 `[experts]`:
    where the tokens of each expert end.
    """
    (tokens, width), neurons = x.shape, out.shape[1]
    if out.numel() == 0:
        return
    base_strides = (0, 0) if base is None else base.stride()
    experts = 1 if ends is None else len(ends)
    mean = -(-values.numel() // (neurons * experts))

    def launch(config: Config, out: Tensor) -> None:
        seen = columns_first(x) if config.columns_first else x
        strides = (*base_strides, *seen.stride(), *out.stride())
        block_tokens = 8 // x.element_size() if config.staged else config.block_tokens
        tiles = -(-tokens // block_tokens) if ends is None else tiles_of(tokens, experts, block_tokens)
        grid = (tiles * -(-neurons // config.block_neurons),)
        sizes = {"BLOCK_NEURONS": config.block_neurons, "num_warps": config.num_warps}
        if not config.staged:
            direct.gather_sum[grid](
                base, seen, values, columns, offsets, entries, ends, out, tokens, neurons, width, experts, k, *strides,
                BLOCK_TOKENS=block_tokens, BLOCK_K=config.block_k, LIGHT=light_of(config, mean), ROUND=LIGHT,
                EXPERTS=power_of_two(experts + 1), **sizes,
            )  # fmt: skip
            return
        sizes |= {"PACK": block_tokens, "WIDTH": power_of_two(width)}
        if owners is None:
            staged.gather_sum_staged[grid](
                base, x, values, columns, out, tokens, neurons, width, k, *strides,
                BLOCK_K=config.block_k, **sizes,
            )  # fmt: skip
        else:
            staged.gather_sum_staged_uneven[grid](
                base, x, values, columns, offsets, entries, owners(), out, tokens, neurons, width, k, *strides,
                BLOCK_ENTRIES=config.block_k, **sizes,
            )  # fmt: skip

    kind = (base is None, columns is None, offsets is None, entries is None, *_dtypes(base, x, values, out))
    key = ("sum", x.device, tuning.bucket(tokens), neurons, width, mean, ends is not None and experts, kind)

    def candidates() -> list[Config]:
        sizes = (neurons, width, mean, x.element_size(), offsets is not None)
        return sum_configs(tokens, *sizes) if ends is None else unstaged(sum_configs(-(-tokens // experts), *sizes))

    with _on(x.device):
        launch(tuning.choice(key, candidates, x.device, lambda: partial(launch, out=torch.empty_like(out))), out)


def add(
    result: Tensor, x: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None, out: Tensor,
    of_experts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`out = result + S x`; arguments as of `bypass`, `out` may be `result`. `of_experts` int32: its `ends`."""
    k = indices.shape[1] if offsets is None else 0
    owners = None if offsets is None else partial(rows_of, indices, offsets)
    gather_sum(result, x, _flat(values), _flat(indices), offsets, None, owners, k, out, of_experts)
    return out


def grad_input(
    grad: Tensor, values: Tensor, indices: Tensor, rows: Tensor | None, entries: Tensor, ends: Tensor, out: Tensor,
    of_experts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`out = S^T grad`; `rows` int32 `[entries]` of a ragged support, `None` for a table; see `sparse_grad_input`.
    `of_experts` as above."""
    k = indices.shape[1] if rows is None else 0
    gather_sum(None, grad, _flat(values), rows, ends, entries, partial(_flat, indices), k, out, of_experts)
    return out


def grad_values(
    grad: Tensor, x: Tensor, indices: Tensor, rows: Tensor | None, of_experts: Tensor | None = None
) -> Tensor:
    """`grad^T x` at the support, fp32 in the shape of `indices`; see `sparse_grad_values`, the others as above."""
    (tokens, width), entries = x.shape, indices.numel()
    experts = 1 if of_experts is None else len(of_experts)
    mean = -(-tokens // experts)  # tokens that an entry sees
    parts, span = splits_of(mean, entries)
    k = indices.shape[1] if rows is None else 0
    sums = torch.empty(parts, entries, dtype=torch.float32, device=x.device)
    columns = _flat(indices)

    def launch(config: Config) -> None:
        strides = (*grad.stride(), *x.stride())
        grid = (parts * -(-entries // config.block_neurons),)
        sizes = {"BLOCK_ENTRIES": config.block_neurons, "num_warps": config.num_warps}
        if config.staged:
            words = power_of_two(width)
            staged.grad_values_staged[grid](
                grad, x, columns, rows, sums, tokens, span, entries, width, k, *strides,
                PACK=8 // x.element_size(), WIDTH=words, GROUP=math.gcd(k, 4) if rows is None else 1,
                AHEAD=words <= WORDS_AHEAD * 32 * config.num_warps, **sizes,
            )  # fmt: skip
        else:
            direct.grad_values[grid](
                grad, x, columns, rows, of_experts, sums, tokens, span, entries, grad.shape[1], parts, k, *strides,
                BLOCK_TOKENS=config.block_tokens, **sizes,
            )  # fmt: skip

    kind = (of_experts is not None and experts, rows is None, *_dtypes(grad, x))
    key = ("values", x.device, tuning.bucket(tokens), entries, width, k, kind)

    def candidates() -> list[Config]:
        configs = value_configs(mean, entries, width, x.element_size())
        return configs if of_experts is None else unstaged(configs)

    with _on(x.device):
        launch(tuning.choice(key, candidates, x.device, lambda: launch))
    # Always in the order of the parts.
    return (sums[0] if parts == 1 else sums.sum(0)).view(indices.shape)
