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
def _write(total, base, out, token, tokens, neuron, neurons, base_token, base_neuron, out_token, out_neuron):
    """Add one token's sums to its base, if there is one, and write them."""
    inside = (neuron < neurons) & (token < tokens)
    place = neuron.to(tl.int64)
    if base is not None:
        total += tl.load(base + token * base_token + place * base_neuron, mask=inside, other=0).to(tl.float32)
    tl.store(out + token * out_token + place * out_neuron, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _per_neuron(total, BLOCK_NEURONS: tl.constexpr, BLOCK_K: tl.constexpr):
    return tl.reduce(tl.reshape(total, (BLOCK_NEURONS, BLOCK_K)), 1, tl.standard._sum_combine)


@triton.jit(do_not_specialize=["tokens"])
def gather_sum_staged(
    base, x, values, columns, out, tokens, neurons, width, k,
    base_token, base_neuron, x_token, x_column, out_token, out_neuron,
    PACK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_NEURONS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """See `direct.gather_sum`, for neurons of k entries each; `x` has `width` columns, a program `PACK` tokens."""
    blocks = (neurons + BLOCK_NEURONS - 1) // BLOCK_NEURONS
    program = tl.program_id(0)
    token = (program // blocks).to(tl.int64) * PACK
    words = _pack(x, token, tokens, width, x_token, x_column, PACK, WIDTH)
    block = (program % blocks) * BLOCK_NEURONS
    # One entry per element, a neuron's entries side by side as they lie in memory.
    place = tl.arange(0, BLOCK_NEURONS * BLOCK_K)
    owner = block + place // BLOCK_K
    number = place % BLOCK_K
    total0 = tl.full((BLOCK_NEURONS * BLOCK_K,), 0.0, tl.float32)
    total1 = total0
    total2 = total0
    total3 = total0
    for done in range(0, k, BLOCK_K):
        exists = (owner < neurons) & (done + number < k)
        entry = owner * k + done + number
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
    _write(_per_neuron(total0, BLOCK_NEURONS, BLOCK_K), base, out, token, tokens, neuron, neurons,
           base_token, base_neuron, out_token, out_neuron)  # fmt: skip
    _write(_per_neuron(total1, BLOCK_NEURONS, BLOCK_K), base, out, token + 1, tokens, neuron, neurons,
           base_token, base_neuron, out_token, out_neuron)  # fmt: skip
    if PACK == 4:
        _write(_per_neuron(total2, BLOCK_NEURONS, BLOCK_K), base, out, token + 2, tokens, neuron, neurons,
               base_token, base_neuron, out_token, out_neuron)  # fmt: skip
        _write(_per_neuron(total3, BLOCK_NEURONS, BLOCK_K), base, out, token + 3, tokens, neuron, neurons,
               base_token, base_neuron, out_token, out_neuron)  # fmt: skip


@triton.jit
def _joined(owner, a0, a1, a2, a3, later, b0, b1, b2, b3):
    """Two neighbouring stretches of entries as one: the last one's neuron, and four tokens' sums over its entries."""
    same = owner == later
    return (
        later,
        b0 + tl.where(same, a0, 0.0),
        b1 + tl.where(same, a1, 0.0),
        b2 + tl.where(same, a2, 0.0),
        b3 + tl.where(same, a3, 0.0),
    )


@triton.jit(do_not_specialize=["tokens"])
def gather_sum_staged_uneven(
    base, x, values, columns, offsets, entries, owners, out, tokens, neurons, width, k,
    base_token, base_neuron, x_token, x_column, out_token, out_neuron,
    PACK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_NEURONS: tl.constexpr, BLOCK_ENTRIES: tl.constexpr,
):  # fmt: skip
    """
    See `direct.gather_sum` with `offsets`; entry e belongs to neuron `owners[e]`.

    A program goes through the entries of its neurons, `BLOCK_ENTRIES` in each round whoever owns them, and sums
    stretches of one owner by a scan. So all programs of some tokens together run at most `entries / BLOCK_ENTRIES + 2`
    rounds per block of neurons, no matter how the entries are spread over the neurons.
    """
    blocks = (neurons + BLOCK_NEURONS - 1) // BLOCK_NEURONS
    program = tl.program_id(0)
    token = (program // blocks).to(tl.int64) * PACK
    words = _pack(x, token, tokens, width, x_token, x_column, PACK, WIDTH)
    block = (program % blocks) * BLOCK_NEURONS
    neuron = block + tl.arange(0, BLOCK_NEURONS)
    first = tl.load(offsets + neuron, mask=neuron < neurons, other=0)
    end = tl.load(offsets + neuron + 1, mask=neuron < neurons, other=0)
    total0 = tl.full((BLOCK_NEURONS,), 0.0, tl.float32)
    total1 = total0
    total2 = total0
    total3 = total0
    # From a multiple of 16, so that a thread's entries are neighbours (half of the scan's instructions); the entries
    # before the block's own are other neurons'.
    start = tl.multiple_of(tl.load(offsets + block) // 16 * 16, 16)
    stop = tl.load(offsets + tl.minimum(block + BLOCK_NEURONS, neurons))
    for done in range(start, stop, BLOCK_ENTRIES):
        number = done + tl.arange(0, BLOCK_ENTRIES)
        exists = number < stop
        entry = number
        if entries is not None:
            entry = tl.load(entries + number, mask=exists, other=0)
        owner = tl.load(owners + entry, mask=exists, other=-1)
        if columns is None:
            column = tl.where(exists, entry // k, 0)
        else:
            column = tl.load(columns + entry, mask=exists, other=0)
        value = tl.load(values + entry, mask=exists, other=0).to(tl.float32)
        seen = tl.where(exists, tl.gather(words, column, 0), 0)
        sum0 = value * _unpack(seen, 0, x.dtype.element_ty, PACK)
        sum1 = value * _unpack(seen, 1, x.dtype.element_ty, PACK)
        sum2 = sum0  # idle in 32 bits
        sum3 = sum1
        if PACK == 4:
            sum2 = value * _unpack(seen, 2, x.dtype.element_ty, PACK)
            sum3 = value * _unpack(seen, 3, x.dtype.element_ty, PACK)
        owner, sum0, sum1, sum2, sum3 = tl.associative_scan((owner, sum0, sum1, sum2, sum3), 0, _joined)
        # A neuron's last entry in this round has the sum of all its entries in this round.
        last = tl.minimum(end, done + BLOCK_ENTRIES) - 1
        here = (last >= first) & (last >= done)
        last = tl.where(here, last - done, 0)
        total0 += tl.where(here, tl.gather(sum0, last, 0), 0.0)
        total1 += tl.where(here, tl.gather(sum1, last, 0), 0.0)
        if PACK == 4:
            total2 += tl.where(here, tl.gather(sum2, last, 0), 0.0)
            total3 += tl.where(here, tl.gather(sum3, last, 0), 0.0)
    _write(total0, base, out, token, tokens, neuron, neurons, base_token, base_neuron, out_token, out_neuron)
    _write(total1, base, out, token + 1, tokens, neuron, neurons, base_token, base_neuron, out_token, out_neuron)
    if PACK == 4:
        _write(total2, base, out, token + 2, tokens, neuron, neurons, base_token, base_neuron, out_token, out_neuron)
        _write(total3, base, out, token + 3, tokens, neuron, neurons, base_token, base_neuron, out_token, out_neuron)


@triton.jit(do_not_specialize=["tokens", "span"])
def grad_values_staged(
    grad, x, columns, rows, partial, tokens, span, number_of_entries, width, k,
    grad_token, grad_row, x_token, x_column,
    PACK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ENTRIES: tl.constexpr, GROUP: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """
    See `direct.grad_values`; `x` has `width` columns, `span` is a multiple of `PACK`.

    `GROUP` neighbouring entries share a row, so that its gradient is loaded once for all of them. `AHEAD`: rows of x
    are loaded while those before them are used.
    """
    blocks = (number_of_entries + BLOCK_ENTRIES - 1) // BLOCK_ENTRIES
    program = tl.program_id(0)
    part = (program // blocks).to(tl.int64)
    block = (program % blocks) * BLOCK_ENTRIES
    entry = block + tl.arange(0, BLOCK_ENTRIES)
    exists = entry < number_of_entries
    column = tl.load(columns + entry, mask=exists, other=0)
    first = block + tl.arange(0, BLOCK_ENTRIES // GROUP) * GROUP
    group_exists = first < number_of_entries
    if rows is None:
        row = (first // k).to(tl.int64) * grad_row
    else:
        row = tl.load(rows + first, mask=group_exists, other=0).to(tl.int64) * grad_row
    total = tl.full((BLOCK_ENTRIES,), 0.0, tl.float32)
    end = tl.minimum((part + 1) * span, tokens)
    words = _pack(x, part * span, end, width, x_token, x_column, PACK, WIDTH)
    for done in range(0, span, PACK):
        token = part * span + done
        if AHEAD:
            following = _pack(x, token + PACK, end, width, x_token, x_column, PACK, WIDTH)
        seen = tl.gather(words, column, 0)
        for s in tl.static_range(PACK):
            inside = group_exists & (token + s < tokens)
            arrived = tl.load(grad + (token + s) * grad_token + row, mask=inside, other=0).to(tl.float32)
            if GROUP > 1:
                arrived = tl.reshape(
                    tl.broadcast_to(arrived[:, None], (BLOCK_ENTRIES // GROUP, GROUP)), (BLOCK_ENTRIES,)
                )
            total += arrived * _unpack(seen, s, x.dtype.element_ty, PACK)
        if not AHEAD:
            following = _pack(x, token + PACK, end, width, x_token, x_column, PACK, WIDTH)
        words = following
    tl.store(partial + part * number_of_entries + entry, total, mask=exists)
