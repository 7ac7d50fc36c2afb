"""Triton kernels that bring whole rows of activations into shared memory first, several tokens to a word.

Gathering from L1 costs a cache line per element; shared memory serves 32 banks at once. The elements of 4 tokens in 16
bits (2 in 32) are packed into one 8-byte word per column: a gathered word serves as many tokens, and an entry's index
and value are read once for all of them. The price: the width is padded to a power of two, and all of its words have to
fit in shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pack(x, token, tokens, width, x_token, x_column, PACK: tl.constexpr, WIDTH: tl.constexpr):
    """int64 `[WIDTH]`: elements of the tokens from `token` on, the first in the lowest bits; zeros beyond the ends."""
    column = tl.arange(0, WIDTH)
    place = column.to(tl.int64) * x_column
    words = tl.full((WIDTH,), 0, tl.int64)
    for s in tl.static_range(PACK):
        inside = (column < width) & (token + s < tokens)
        element = tl.load(x + (token + s) * x_token + place, mask=inside, other=0)
        if PACK == 4:
            bits = element.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
        else:
            bits = element.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        words |= bits << (s * (64 // PACK))
    return words


@triton.jit
def _unpack(words, s: tl.constexpr, dtype: tl.constexpr, PACK: tl.constexpr):
    """The s-th token's elements of packed words, as fp32."""
    if PACK == 4:
        bits = (words >> (s * 16)).to(tl.int16)
    else:
        bits = (words >> (s * 32)).to(tl.int32)
    return bits.to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _finish(
    total, base, out, token, tokens, neuron, neurons, base_token, base_neuron, out_token, out_neuron,
    BLOCK_NEURONS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum the products of each neuron and write one token's output."""
    delta = tl.reduce(tl.reshape(total, (BLOCK_NEURONS, BLOCK_K)), 1, tl.standard._sum_combine)
    inside = (neuron < neurons) & (token < tokens)
    place = neuron.to(tl.int64)
    if base is not None:
        delta += tl.load(base + token * base_token + place * base_neuron, mask=inside, other=0).to(tl.float32)
    tl.store(out + token * out_token + place * out_neuron, delta.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def gather_sum_staged(
    base, x, values, columns, offsets, entries, out, tokens, neurons, width, k,
    base_token, base_neuron, x_token, x_column, out_token, out_neuron,
    PACK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_NEURONS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """See `direct.gather_sum`; `x` has `width` columns, and a program handles `PACK` tokens."""
    blocks = (neurons + BLOCK_NEURONS - 1) // BLOCK_NEURONS
    program = tl.program_id(0)
    token = (program // blocks).to(tl.int64) * PACK
    words = _pack(x, token, tokens, width, x_token, x_column, PACK, WIDTH)
    block = (program % blocks) * BLOCK_NEURONS
    # One entry per element, a neuron's entries side by side as they lie in memory.
    place = tl.arange(0, BLOCK_NEURONS * BLOCK_K)
    owner = block + place // BLOCK_K
    number = place % BLOCK_K
    if offsets is None:
        first = owner * k
        count = tl.full((BLOCK_NEURONS * BLOCK_K,), 0, tl.int32) + k
        longest = k
    else:
        first = tl.load(offsets + owner, mask=owner < neurons, other=0)
        count = tl.load(offsets + owner + 1, mask=owner < neurons, other=0) - first
        longest = tl.reduce(count, 0, tl.standard._elementwise_max)
    total0 = tl.full((BLOCK_NEURONS * BLOCK_K,), 0.0, tl.float32)
    total1 = total0
    total2 = total0
    total3 = total0
    for done in range(0, longest, BLOCK_K):
        exists = (owner < neurons) & (done + number < count)
        entry = first + done + number
        if entries is not None:
            entry = tl.load(entries + entry, mask=exists, other=0)
        if columns is None:
            column = tl.where(exists, entry // k, 0)
        else:
            column = tl.load(columns + entry, mask=exists, other=0)
        value = tl.load(values + entry, mask=exists, other=0).to(tl.float32)
        seen = tl.gather(words, column, 0)
        # Where no entry is, column 0 was read, and zero times infinity is not zero.
        seen = tl.where(exists, seen, 0)
        total0 += value * _unpack(seen, 0, x.dtype.element_ty, PACK)
        total1 += value * _unpack(seen, 1, x.dtype.element_ty, PACK)
        if PACK == 4:
            total2 += value * _unpack(seen, 2, x.dtype.element_ty, PACK)
            total3 += value * _unpack(seen, 3, x.dtype.element_ty, PACK)
    neuron = block + tl.arange(0, BLOCK_NEURONS)
    _finish(total0, base, out, token, tokens, neuron, neurons, base_token, base_neuron, out_token, out_neuron,
            BLOCK_NEURONS, BLOCK_K)  # fmt: skip
    _finish(total1, base, out, token + 1, tokens, neuron, neurons, base_token, base_neuron, out_token, out_neuron,
            BLOCK_NEURONS, BLOCK_K)  # fmt: skip
    if PACK == 4:
        _finish(total2, base, out, token + 2, tokens, neuron, neurons, base_token, base_neuron, out_token, out_neuron,
                BLOCK_NEURONS, BLOCK_K)  # fmt: skip
        _finish(total3, base, out, token + 3, tokens, neuron, neurons, base_token, base_neuron, out_token, out_neuron,
                BLOCK_NEURONS, BLOCK_K)  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "span"])
def grad_values_staged(
    grad, x, columns, rows, partial, tokens, span, number_of_entries, width, k,
    grad_token, grad_row, x_token, x_column,
    PACK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ENTRIES: tl.constexpr,
):  # fmt: skip
    """See `direct.grad_values`; `x` has `width` columns, `span` is a multiple of `PACK`."""
    blocks = (number_of_entries + BLOCK_ENTRIES - 1) // BLOCK_ENTRIES
    program = tl.program_id(0)
    part = (program // blocks).to(tl.int64)
    entry = (program % blocks) * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    exists = entry < number_of_entries
    column = tl.load(columns + entry, mask=exists, other=0)
    if rows is None:
        row = (entry // k).to(tl.int64) * grad_row
    else:
        row = tl.load(rows + entry, mask=exists, other=0).to(tl.int64) * grad_row
    total = tl.full((BLOCK_ENTRIES,), 0.0, tl.float32)
    for done in range(0, span, PACK):
        token = part * span + done
        seen = tl.gather(_pack(x, token, tokens, width, x_token, x_column, PACK, WIDTH), column, 0)
        for s in tl.static_range(PACK):
            inside = exists & (token + s < tokens)
            arrived = tl.load(grad + (token + s) * grad_token + row, mask=inside, other=0).to(tl.float32)
            total += arrived * _unpack(seen, s, x.dtype.element_ty, PACK)
    tl.store(partial + part * number_of_entries + entry, total, mask=exists)
