"""The passes of `kernel.delta_rule` over a stream of tokens, one program per chunk or per stream.

A stream is one head of one row of the batch. Symbols are those of README.md, "On a GPU"; tiles are padded to powers of
two (`wide`), and rows past the end of the tokens are masked: they write nothing and decay nothing.
"""

# ruff: noqa: ANN001, ANN201 - a kernel's arguments are Triton's own; only what is fixed at compile time is annotated.

from __future__ import annotations

from typing import no_type_check

from cortex_core.fast_weights.kernel_math import (
    jit,
    load_matrix,
    load_rows,
    load_square,
    position,
    row_of,
    solve,
    store_matrix,
    store_rows,
    tl,
    weights,
    within,
    written,
)


@jit
@no_type_check
def prepare(
    keys, queries, columns, write, log_kept,
    erased, kept, reach, solved, scored, added, partial,
    keys_b, keys_h, keys_t, queries_b, queries_h, queries_t, columns_b, columns_h, columns_t,
    heads, tokens, chunks,
    rank: tl.constexpr, dim: tl.constexpr, chunk: tl.constexpr, rank_wide: tl.constexpr, dim_wide: tl.constexpr,
    reads: tl.constexpr, backward: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """One chunk, without the state before it. What it does to that state: S' = kept S - erased S + added.

    Forward, `columns` are the values: `added`, and, where it is read, `reach` and `partial`, so that the outputs are
    reach S + partial. Backward, `columns` are the gradients of the outputs: `added` is what they ask of the state
    before the chunk; the triangle's inverse and the decayed products of queries and keys go to `solved` and `scored`.
    """
    number, stream, place = position(chunks, chunk)
    w, between, so_far, to_end, all_kept = weights(write, log_kept, stream, place, tokens, chunk)
    k = load_rows(row_of(keys, stream, heads, keys_b, keys_h), place, tokens, keys_t, 0, rank, rank_wide)
    solution = solve(k, w, between, chunk, precision)
    asked = (w * so_far)[:, None] * k  # what each token looks up of the state before the chunk
    left = tl.dot(tl.trans(solution), to_end[:, None] * k, input_precision=precision)
    number = stream * chunks + number
    gone = tl.dot(tl.trans(left), asked, input_precision=precision)
    store_matrix(erased + number * rank * rank, 0, rank, rank, rank_wide, rank_wide, gone)
    tl.store(kept + number, all_kept)
    if backward:
        store_matrix(solved + number * chunk * chunk, 0, chunk, chunk, chunk, chunk, solution)
    reached = left
    scores = solution
    if reads:
        q = row_of(queries, stream, heads, queries_b, queries_h)
        q = load_rows(q, place, tokens, queries_t, 0, rank, rank_wide)
        scores = between * tl.dot(q, tl.trans(k), input_precision=precision)
        if backward:
            store_matrix(scored + number * chunk * chunk, 0, chunk, chunk, chunk, chunk, scores)
        scores = tl.dot(scores, solution, input_precision=precision)
        reached = so_far[:, None] * q - tl.dot(scores, asked, input_precision=precision)
        if not backward:
            store_rows(reach + stream * tokens * rank, place, tokens, rank, 0, rank, rank_wide, reached)
    if reads or not backward:
        origin = row_of(columns, stream, heads, columns_b, columns_h)
        for start in range(0, dim, dim_wide):
            tile = load_rows(origin, place, tokens, columns_t, start, dim, dim_wide)
            if not backward:
                tile = w[:, None] * tile
                if reads:
                    out = tl.dot(scores, tile, input_precision=precision)
                    store_rows(partial + stream * tokens * dim, place, tokens, dim, start, dim, dim_wide, out)
                out = tl.dot(tl.trans(left), tile, input_precision=precision)
            else:
                out = tl.dot(tl.trans(reached), tile, input_precision=precision)
            # The states are one longer than the chunks: forward this goes behind the state it is added to.
            slot = number + stream + (0 if backward else 1)
            store_matrix(added + slot * rank * dim, start, rank, dim, rank_wide, dim_wide, out)


@jit
@no_type_check
def carry(
    erased, kept, states, chunks,
    rank: tl.constexpr, dim: tl.constexpr, rank_wide: tl.constexpr, dim_wide: tl.constexpr,
    backward: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The one loop over chunks, in place.

    Every slot of `states` but the first (backward: but the last) holds what is added, then the state.
    No decay and nothing erased leave the state bit for bit, at any precision of the product.
    """
    stream = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * dim_wide
    states += stream * (chunks + 1) * rank * dim
    erased += stream * chunks * rank * rank
    kept += stream * chunks
    step = -1 if backward else 1
    number = chunks - 1 if backward else 0
    slot = states + (number + (0 if backward else 1)).to(tl.int64) * rank * dim
    state = load_matrix(slot - step * rank * dim, start, rank, dim, rank_wide, dim_wide)
    gone = load_matrix(erased + number.to(tl.int64) * rank * rank, 0, rank, rank, rank_wide, rank_wide)
    more = load_matrix(slot, start, rank, dim, rank_wide, dim_wide)
    left = tl.load(kept + number)
    for _ in range(chunks):
        # What the next step needs is on its way while this one computes; the last one asks for its own again.
        following = tl.minimum(tl.maximum(number + step, 0), chunks - 1)
        next_slot = states + (following + (0 if backward else 1)).to(tl.int64) * rank * dim
        next_gone = load_matrix(erased + following.to(tl.int64) * rank * rank, 0, rank, rank, rank_wide, rank_wide)
        next_more = load_matrix(next_slot, start, rank, dim, rank_wide, dim_wide)
        next_left = tl.load(kept + following)
        if backward:
            gone = tl.trans(gone)
        state = left * state - tl.dot(gone, state, input_precision=precision) + more
        store_matrix(slot, start, rank, dim, rank_wide, dim_wide, state)
        number, slot, gone, more, left = following, next_slot, next_gone, next_more, next_left


@jit
@no_type_check
def read(
    reach, states, partial, outputs, tokens, chunks,
    rank: tl.constexpr, dim: tl.constexpr, chunk: tl.constexpr, rank_wide: tl.constexpr, dim_wide: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk, now that the state before it is known."""
    number, stream, place = position(chunks, chunk)
    start = tl.program_id(1) * dim_wide
    reached = load_rows(reach + stream * tokens * rank, place, tokens, rank, 0, rank, rank_wide)
    state = states + (stream * (chunks + 1) + number) * rank * dim
    state = load_matrix(state, start, rank, dim, rank_wide, dim_wide)
    own = load_rows(partial + stream * tokens * dim, place, tokens, dim, start, dim, dim_wide)
    out = tl.dot(reached, state, input_precision=precision) + own
    store_rows(outputs + stream * tokens * dim, place, tokens, dim, start, dim, dim_wide, out)


@jit
@no_type_check
def errors(
    keys, values, write, log_kept, solved, scored, states, d_states, d_outputs, error, asked,
    keys_b, keys_h, keys_t, values_b, values_h, values_t,
    heads, tokens, chunks,
    rank: tl.constexpr, dim: tl.constexpr, chunk: tl.constexpr, rank_wide: tl.constexpr, dim_wide: tl.constexpr,
    reads: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """What each token of a chunk wrote, and the gradient of what it was asked to write, for `gradients`."""
    number, stream, place = position(chunks, chunk)
    start = tl.program_id(1) * dim_wide
    w, _, so_far, to_end, _ = weights(write, log_kept, stream, place, tokens, chunk)
    k = load_rows(row_of(keys, stream, heads, keys_b, keys_h), place, tokens, keys_t, 0, rank, rank_wide)
    square = (stream * chunks + number) * chunk * chunk
    matrix = (stream * (chunks + 1) + number) * rank * dim
    flat = stream * tokens * dim
    solution = load_square(solved + square, chunk, True)
    scores = load_square(scored + square, chunk, reads)
    state = load_matrix(states + matrix, start, rank, dim, rank_wide, dim_wide)
    d_state = load_matrix(d_states + matrix + rank * dim, start, rank, dim, rank_wide, dim_wide)
    value = row_of(values, stream, heads, values_b, values_h)
    value = load_rows(value, place, tokens, values_t, start, dim, dim_wide)
    d_out = value
    if reads:
        d_out = load_rows(d_outputs + flat, place, tokens, dim, start, dim, dim_wide)
    wrote, d_ask = written(k, value, state, d_state, d_out, solution, scores, w, so_far, to_end, reads, precision)
    store_rows(error + flat, place, tokens, dim, start, dim, dim_wide, wrote)
    store_rows(asked + flat, place, tokens, dim, start, dim, dim_wide, d_ask)


@jit
@no_type_check
def gradients(
    keys, queries, values, write, log_kept, solved, scored, states, d_states, d_outputs, error, asked,
    d_keys, d_queries, d_values, d_write, d_log_kept,
    keys_b, keys_h, keys_t, queries_b, queries_h, queries_t, values_b, values_h, values_t,
    heads, tokens, chunks,
    rank: tl.constexpr, dim: tl.constexpr, chunk: tl.constexpr, rank_wide: tl.constexpr, dim_wide: tl.constexpr,
    reads: tl.constexpr, alone: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk: `alone`, or from what `errors` has found."""
    number, stream, place = position(chunks, chunk)
    w, between, so_far, to_end, all_kept = weights(write, log_kept, stream, place, tokens, chunk)
    k = load_rows(row_of(keys, stream, heads, keys_b, keys_h), place, tokens, keys_t, 0, rank, rank_wide)
    values = row_of(values, stream, heads, values_b, values_h)
    square = (stream * chunks + number) * chunk * chunk
    states += (stream * (chunks + 1) + number) * rank * dim
    d_states += (stream * (chunks + 1) + number + 1) * rank * dim
    flat = stream * tokens * dim
    solution = load_square(solved + square, chunk, alone)
    scores = load_square(scored + square, chunk, reads)
    d_system = tl.zeros([chunk, chunk], tl.float32)
    d_scores = tl.zeros([chunk, chunk], tl.float32)
    by_lookup = tl.zeros([chunk, rank_wide], tl.float32)  # gradient of the keys, where they look up the state before
    by_end = tl.zeros([chunk, rank_wide], tl.float32)  # and where they are written into the state after
    d_q = tl.zeros([chunk, rank_wide], tl.float32)
    d_w = tl.zeros([chunk], tl.float32)
    d_last = 0.0  # by the sum of logarithms over the chunk
    for start in range(0, dim, dim_wide):
        state = load_matrix(states, start, rank, dim, rank_wide, dim_wide)
        d_state = load_matrix(d_states, start, rank, dim, rank_wide, dim_wide)
        d_last += all_kept * tl.sum(tl.sum(state * d_state, axis=1), axis=0)
        v = load_rows(values, place, tokens, values_t, start, dim, dim_wide)
        d_out = v
        if reads:
            d_out = load_rows(d_outputs + flat, place, tokens, dim, start, dim, dim_wide)
        if alone:
            wrote, d_ask = written(k, v, state, d_state, d_out, solution, scores, w, so_far, to_end, reads, precision)
        else:
            wrote = load_rows(error + flat, place, tokens, dim, start, dim, dim_wide)
            d_ask = load_rows(asked + flat, place, tokens, dim, start, dim, dim_wide)
        if reads:
            d_scores += tl.dot(d_out, tl.trans(wrote), input_precision=precision)
            d_q += tl.dot(so_far[:, None] * d_out, tl.trans(state), input_precision=precision)
        by_end += tl.dot(to_end[:, None] * wrote, tl.trans(d_state), input_precision=precision)
        d_system -= tl.dot(d_ask, tl.trans(wrote), input_precision=precision)
        by_lookup -= tl.dot(so_far[:, None] * d_ask, tl.trans(state), input_precision=precision)
        d_w += tl.sum(d_ask * v, axis=1)
        store_rows(d_values + flat, place, tokens, dim, start, dim, dim_wide, w[:, None] * d_ask)
    q = k
    if reads:
        q = row_of(queries, stream, heads, queries_b, queries_h)
        q = load_rows(q, place, tokens, queries_t, 0, rank, rank_wide)
    d_k, d_q, d_w, d_log = within(
        k, q, w, between, scores, d_system, d_scores, by_lookup, by_end, d_q, d_w, d_last, chunk, reads, precision
    )
    if reads:
        store_rows(d_queries + stream * tokens * rank, place, tokens, rank, 0, rank, rank_wide, d_q)
    store_rows(d_keys + stream * tokens * rank, place, tokens, rank, 0, rank, rank_wide, d_k)
    tl.store(d_write + stream * tokens + place, d_w, mask=place < tokens)
    tl.store(d_log_kept + stream * tokens + place, d_log, mask=place < tokens)
