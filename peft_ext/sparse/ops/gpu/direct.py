"""Triton kernels that gather straight from device memory, any strides; sums in fp32.

Both read tokens × entries elements of the activations, column by column of one row. A row (8 KB at 4096 inputs in
16 bits) stays in L1, and so do its neighbours' in L2: programs that share tokens have neighbouring numbers and run
together. Over a copy of `transposed`, what an entry reads of many tokens is one piece of memory instead. Addresses are
int64, since tokens × width may pass 2^31.

With `ends`, tokens are sorted by expert and each expert has neurons of its own: those of expert e are numbered from
`e * neurons` on. The loads stay on the device: a program finds its expert itself.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _resolved(entries, entry, exists):
    """Numbers of entries, through a transposed table if there is one."""
    if entries is not None:
        entry = tl.load(entries + entry, mask=exists, other=0)
    return entry


@triton.jit
def _column(columns, entry, exists, k):
    """The columns that entries read, int64."""
    if columns is None:
        column = entry // k
    else:
        column = tl.load(columns + entry, mask=exists, other=0)
    return column.to(tl.int64)


@triton.jit
def _tile_of_expert(ends, experts, tokens, tile, BLOCK_TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    """
    Expert, first token and end of the tokens of a tile; each expert's tokens fall into tiles of their own. Tokens
    behind the last end are those of one more expert; tiles beyond the last one are empty.
    """
    number = tl.arange(0, EXPERTS)
    end = tl.load(ends + number, mask=number < experts, other=tokens)
    start = tl.load(ends + number - 1, mask=(number > 0) & (number <= experts), other=0)
    start = tl.where(number > experts, end, start)
    tiles = (end - start + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    after = tl.associative_scan(tiles, 0, tl.standard._sum_combine)
    before = after - tiles
    here = (before <= tile) & (tile < after)
    expert = tl.reduce(tl.where(here, number, 0), 0, tl.standard._sum_combine)
    first = tl.reduce(tl.where(here, start + (tile - before) * BLOCK_TOKENS, 0), 0, tl.standard._sum_combine)
    last = tl.reduce(tl.where(here, end, 0), 0, tl.standard._sum_combine)
    return expert, first, last


@triton.jit(do_not_specialize=["tokens"])
def transposed(x, out, tokens, width, x_token, x_column, out_column, BLOCK: tl.constexpr):
    """`out[c, t] = x[t, c]`, where `out` has `out_column` elements per column."""
    blocks = (width + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    token = (program // blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (column < width)[None, :]
    tile = tl.load(x + token[:, None] * x_token + column[None, :] * x_column, mask=inside, other=0)
    tl.store(out + column[:, None] * out_column + token[None, :], tl.trans(tile), mask=tl.trans(inside))


# Not specialised on `tokens`, so that no sequence length compiles anew.
@triton.jit(do_not_specialize=["tokens"])
def gather_sum(
    base, x, values, columns, offsets, entries, ends, out, tokens, neurons, width, experts, k,
    base_token, base_neuron, x_token, x_column, out_token, out_neuron,
    BLOCK_TOKENS: tl.constexpr, BLOCK_NEURONS: tl.constexpr, BLOCK_K: tl.constexpr, LIGHT: tl.constexpr,
    ROUND: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """
    `out[t, n] = base[t, n] + sum over n's entries e of values[e] * x[t, columns[e]]`, rounded once.

    Neuron n owns the entries `n * k` to `(n + 1) * k`, or with `offsets` those from `offsets[n]` to `offsets[n + 1]`.
    With `entries` these are numbers of entries (a transposed table); without `columns` an entry reads column
    `entry // k`. Without `base` the sum is written alone. With `offsets` a neuron may own very many entries (inputs
    that most rows select do, in a transposed table): all neurons together sum their first `LIGHT` ones, then those
    with more get the whole program, one after the other, `ROUND` entries at a time. With `ends` the columns of a
    transposed table are numbered through all experts, `width` for each; tokens of none get no sum.
    """
    blocks = (neurons + BLOCK_NEURONS - 1) // BLOCK_NEURONS
    program = tl.program_id(0)
    block = (program % blocks) * BLOCK_NEURONS
    neuron = block + tl.arange(0, BLOCK_NEURONS)
    neuron_exists = neuron < neurons
    if ends is None:
        token = (program // blocks).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        token_exists = token < tokens
        owned, row, shift = neuron_exists, neuron, 0
    else:
        expert, start, stop = _tile_of_expert(ends, experts, tokens, program // blocks, BLOCK_TOKENS, EXPERTS)
        token = start.to(tl.int64) + tl.arange(0, BLOCK_TOKENS)
        token_exists = token < stop
        owned, row, shift = neuron_exists & (expert < experts), expert * neurons + neuron, expert * width
    if offsets is None:
        first = row * k
        count = tl.full((BLOCK_NEURONS,), 0, tl.int32) + k
        longest = k
        together = k
    else:
        first = tl.load(offsets + row, mask=owned, other=0)
        count = tl.load(offsets + row + 1, mask=owned, other=0) - first
        longest = tl.reduce(count, 0, tl.standard._elementwise_max)
        together = tl.minimum(longest, LIGHT)
    total = tl.full((BLOCK_TOKENS, BLOCK_NEURONS), 0.0, tl.float32)
    for done in range(0, together, BLOCK_K):
        number = done + tl.arange(0, BLOCK_K)
        exists = owned[:, None] & (number[None, :] < count[:, None])  # [neurons, k]
        entry = _resolved(entries, first[:, None] + number[None, :], exists)
        column = _column(columns, entry, exists, k)
        if ends is not None and entries is not None:
            column -= shift
        value = tl.load(values + entry, mask=exists, other=0).to(tl.float32)
        seen = tl.load(
            x + token[:, None, None] * x_token + column[None, :, :] * x_column,
            mask=token_exists[:, None, None] & exists[None, :, :],
            other=0,
        )  # [tokens, neurons, k]
        total += tl.reduce(seen.to(tl.float32) * value[None, :, :], 2, tl.standard._sum_combine)
    if offsets is not None:  # noqa: SIM102 (decided when compiling, the next one when running)
        if longest > LIGHT:
            owner = block - 1
            for _ in range(0, tl.reduce((count > LIGHT).to(tl.int32), 0, tl.standard._sum_combine)):
                after = tl.where((count > LIGHT) & (neuron > owner), neuron, block + BLOCK_NEURONS)
                owner = tl.reduce(after, 0, tl.standard._elementwise_min)  # the next of those
                owner_row = owner
                if ends is not None:
                    owner_row = expert * neurons + owner
                begin = tl.load(offsets + owner_row) + LIGHT
                end = tl.load(offsets + owner_row + 1)
                rest = tl.full((BLOCK_TOKENS,), 0.0, tl.float32)
                for done in range(begin, end, ROUND):
                    number = done + tl.arange(0, ROUND)
                    exists = number < end
                    entry = _resolved(entries, number, exists)
                    column = _column(columns, entry, exists, k)
                    if ends is not None and entries is not None:
                        column -= shift
                    value = tl.load(values + entry, mask=exists, other=0).to(tl.float32)
                    seen = tl.load(
                        x + token[:, None] * x_token + column[None, :] * x_column,
                        mask=token_exists[:, None] & exists[None, :],
                        other=0,
                    )  # [tokens, entries]
                    rest += tl.reduce(seen.to(tl.float32) * value[None, :], 1, tl.standard._sum_combine)
                total += tl.where(neuron[None, :] == owner, rest[:, None], 0.0)
    inside = token_exists[:, None] & neuron_exists[None, :]
    place = neuron.to(tl.int64)[None, :]
    if base is not None:
        total += tl.load(base + token[:, None] * base_token + place * base_neuron, mask=inside, other=0).to(tl.float32)
    tl.store(out + token[:, None] * out_token + place * out_neuron, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "span", "parts"])
def grad_values(
    grad, x, columns, rows, ends, partial, tokens, span, number_of_entries, neurons, parts, k,
    grad_token, grad_row, x_token, x_column,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ENTRIES: tl.constexpr,
):  # fmt: skip
    """
    `partial[s, e] = sum of grad[t, row(e)] * x[t, columns[e]]` over the s-th `span` tokens, fp32.

    An entry's row is `rows[e]`, or `e // k` without `rows`. Each program owns its sums: no atomics, so that equal
    inputs give equal bits. With `ends` an entry sees its expert's tokens, and a program the s-th of `parts` of the
    tokens of the experts that its entries belong to.
    """
    blocks = (number_of_entries + BLOCK_ENTRIES - 1) // BLOCK_ENTRIES
    program = tl.program_id(0)
    part = (program // blocks).to(tl.int64)
    entry = (program % blocks) * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    exists = entry < number_of_entries
    column = tl.load(columns + entry, mask=exists, other=0).to(tl.int64) * x_column
    if rows is None:
        row = entry // k
    else:
        row = tl.load(rows + entry, mask=exists, other=0)
    first = part * span
    if ends is not None:
        expert = row // neurons
        row -= expert * neurons
        start = tl.load(ends + expert - 1, mask=exists & (expert > 0), other=0)
        stop = tl.load(ends + expert, mask=exists, other=0)
        lowest = tl.reduce(tl.where(exists, start, tokens), 0, tl.standard._elementwise_min)
        span = (tl.reduce(stop, 0, tl.standard._elementwise_max) - lowest + parts - 1) // parts
        first = lowest + part * span
    row = row.to(tl.int64) * grad_row
    total = tl.full((BLOCK_TOKENS, BLOCK_ENTRIES), 0.0, tl.float32)
    for done in range(0, span, BLOCK_TOKENS):
        within = done + tl.arange(0, BLOCK_TOKENS)
        token = first + within
        inside = ((within < span) & (token < tokens))[:, None] & exists[None, :]
        if ends is not None:
            inside = inside & (token[:, None] >= start[None, :]) & (token[:, None] < stop[None, :])
        seen = tl.load(x + token[:, None] * x_token + column[None, :], mask=inside, other=0)
        arrived = tl.load(grad + token[:, None] * grad_token + row[None, :], mask=inside, other=0)
        total += seen.to(tl.float32) * arrived.to(tl.float32)
    total = tl.reduce(total, 0, tl.standard._sum_combine)
    tl.store(partial + part * number_of_entries + entry, total, mask=exists)
