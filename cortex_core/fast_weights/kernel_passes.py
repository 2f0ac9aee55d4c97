"""The passes of `kernel.delta_rule` over a stream of tokens, one program per chunk or per stream.

A stream is one head of one row of the batch. Symbols are those of README.md, "On a GPU"; tiles are padded to powers of
two (`wide`), and rows past the end of the tokens are masked: they write nothing and decay nothing.
"""

# ruff: noqa: ANN001, ANN201 - a kernel's arguments are Triton's own; only what is fixed at compile time is annotated.

from __future__ import annotations

from typing import no_type_check

from cortex_core.fast_weights.kernel_math import jit, load_rows, row_of, solve, store_rows, tl, weights, within


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
    number = tl.program_id(0) % chunks
    stream = (tl.program_id(0) // chunks).to(tl.int64)
    place = (number * chunk + tl.arange(0, chunk)).to(tl.int64)
    w, between, so_far, to_end, all_kept = weights(write, log_kept, stream, place, tokens, chunk)
    k = load_rows(row_of(keys, stream, heads, keys_b, keys_h), place, tokens, keys_t, rank, rank_wide)
    solution = solve(k, w, between, chunk, precision)
    asked = (w * so_far)[:, None] * k  # what each token looks up of the state before the chunk
    left = tl.dot(tl.trans(solution), to_end[:, None] * k, input_precision=precision)
    number = stream * chunks + number
    rows = tl.arange(0, rank_wide)
    t = tl.arange(0, chunk)
    gone = tl.dot(tl.trans(left), asked, input_precision=precision)
    store_rows(erased + number * rank * rank, rows, rank, rank, rank, rank_wide, gone)
    tl.store(kept + number, all_kept)
    if backward:
        store_rows(solved + number * chunk * chunk, t, chunk, chunk, chunk, chunk, solution)
    reached = left
    scores = solution
    if reads:
        q = load_rows(row_of(queries, stream, heads, queries_b, queries_h), place, tokens, queries_t, rank, rank_wide)
        scores = between * tl.dot(q, tl.trans(k), input_precision=precision)
        if backward:
            store_rows(scored + number * chunk * chunk, t, chunk, chunk, chunk, chunk, scores)
        scores = tl.dot(scores, solution, input_precision=precision)
        reached = so_far[:, None] * q - tl.dot(scores, asked, input_precision=precision)
        if not backward:
            store_rows(reach + stream * tokens * rank, place, tokens, rank, rank, rank_wide, reached)
    if reads or not backward:
        origin = row_of(columns, stream, heads, columns_b, columns_h)
        for start in range(0, dim, dim_wide):
            tile = load_rows(origin + start, place, tokens, columns_t, dim - start, dim_wide)
            if not backward:
                tile = w[:, None] * tile
                if reads:
                    out = tl.dot(scores, tile, input_precision=precision)
                    target = partial + stream * tokens * dim + start
                    store_rows(target, place, tokens, dim, dim - start, dim_wide, out)
                out = tl.dot(tl.trans(left), tile, input_precision=precision)
            else:
                out = tl.dot(tl.trans(reached), tile, input_precision=precision)
            # The states are one longer than the chunks: forward this goes behind the state it is added to.
            slot = number + stream + (0 if backward else 1)
            store_rows(added + slot * rank * dim + start, rows, rank, dim, dim - start, dim_wide, out)


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
    rows = tl.arange(0, rank_wide)
    states += stream * (chunks + 1) * rank * dim + start
    first = chunks if backward else 0
    state = load_rows(states + first.to(tl.int64) * rank * dim, rows, rank, dim, dim - start, dim_wide)
    for step in range(chunks):
        number = chunks - 1 - step if backward else step
        chunk = stream * chunks + number
        gone = load_rows(erased + chunk * rank * rank, rows, rank, rank, rank, rank_wide)
        if backward:
            gone = tl.trans(gone)
        slot = states + (number + (0 if backward else 1)).to(tl.int64) * rank * dim
        more = load_rows(slot, rows, rank, dim, dim - start, dim_wide)
        state = tl.load(kept + chunk) * state - tl.dot(gone, state, input_precision=precision) + more
        store_rows(slot, rows, rank, dim, dim - start, dim_wide, state)


@jit
@no_type_check
def read(
    reach, states, partial, outputs, tokens, chunks,
    rank: tl.constexpr, dim: tl.constexpr, chunk: tl.constexpr, rank_wide: tl.constexpr, dim_wide: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk, now that the state before it is known."""
    number = tl.program_id(0) % chunks
    stream = (tl.program_id(0) // chunks).to(tl.int64)
    start = tl.program_id(1) * dim_wide
    place = (number * chunk + tl.arange(0, chunk)).to(tl.int64)
    reached = load_rows(reach + stream * tokens * rank, place, tokens, rank, rank, rank_wide)
    state = states + (stream * (chunks + 1) + number) * rank * dim + start
    state = load_rows(state, tl.arange(0, rank_wide), rank, dim, dim - start, dim_wide)
    own = load_rows(partial + stream * tokens * dim + start, place, tokens, dim, dim - start, dim_wide)
    out = tl.dot(reached, state, input_precision=precision) + own
    store_rows(outputs + stream * tokens * dim + start, place, tokens, dim, dim - start, dim_wide, out)


@jit
@no_type_check
def errors(
    keys, values, write, log_kept, solved, scored, states, d_states, d_outputs, error, asked,
    keys_b, keys_h, keys_t, values_b, values_h, values_t,
    heads, tokens, chunks,
    rank: tl.constexpr, dim: tl.constexpr, chunk: tl.constexpr, rank_wide: tl.constexpr, dim_wide: tl.constexpr,
    reads: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """What each token of a chunk wrote (`error`), and the gradient of what it was asked to write (`asked`)."""
    number = tl.program_id(0) % chunks
    stream = (tl.program_id(0) // chunks).to(tl.int64)
    start = tl.program_id(1) * dim_wide
    place = (number * chunk + tl.arange(0, chunk)).to(tl.int64)
    w, _, so_far, to_end, _ = weights(write, log_kept, stream, place, tokens, chunk)
    k = load_rows(row_of(keys, stream, heads, keys_b, keys_h), place, tokens, keys_t, rank, rank_wide)
    t = tl.arange(0, chunk)
    rows = tl.arange(0, rank_wide)
    square = (stream * chunks + number) * chunk * chunk
    state = (stream * (chunks + 1) + number) * rank * dim + start
    flat = stream * tokens * dim + start
    solution = load_rows(solved + square, t, chunk, chunk, chunk, chunk)
    held = load_rows(states + state, rows, rank, dim, dim - start, dim_wide)
    held = so_far[:, None] * tl.dot(k, held, input_precision=precision)
    wrong = row_of(values, stream, heads, values_b, values_h) + start
    wrong = load_rows(wrong, place, tokens, values_t, dim - start, dim_wide) - held
    wrong = tl.dot(solution, w[:, None] * wrong, input_precision=precision)
    store_rows(error + flat, place, tokens, dim, dim - start, dim_wide, wrong)
    d_error = load_rows(d_states + state + rank * dim, rows, rank, dim, dim - start, dim_wide)
    d_error = to_end[:, None] * tl.dot(k, d_error, input_precision=precision)
    if reads:
        scores = load_rows(scored + square, t, chunk, chunk, chunk, chunk)
        d_out = load_rows(d_outputs + flat, place, tokens, dim, dim - start, dim_wide)
        d_error += tl.dot(tl.trans(scores), d_out, input_precision=precision)
    d_error = tl.dot(tl.trans(solution), d_error, input_precision=precision)
    store_rows(asked + flat, place, tokens, dim, dim - start, dim_wide, d_error)


@jit
@no_type_check
def gradients(
    keys, queries, values, write, log_kept, scored, states, d_states, d_outputs, error, asked,
    d_keys, d_queries, d_values, d_write, d_log_kept,
    keys_b, keys_h, keys_t, queries_b, queries_h, queries_t, values_b, values_h, values_t,
    heads, tokens, chunks,
    rank: tl.constexpr, dim: tl.constexpr, chunk: tl.constexpr, rank_wide: tl.constexpr, dim_wide: tl.constexpr,
    reads: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk, from what `errors` found."""
    number = tl.program_id(0) % chunks
    stream = (tl.program_id(0) // chunks).to(tl.int64)
    place = (number * chunk + tl.arange(0, chunk)).to(tl.int64)
    rows = tl.arange(0, rank_wide)
    t = tl.arange(0, chunk)
    w, between, so_far, to_end, all_kept = weights(write, log_kept, stream, place, tokens, chunk)
    values = row_of(values, stream, heads, values_b, values_h)
    square = (stream * chunks + number) * chunk * chunk
    states += (stream * (chunks + 1) + number) * rank * dim
    d_states += (stream * (chunks + 1) + number + 1) * rank * dim
    flat = stream * tokens * dim

    d_system = tl.zeros([chunk, chunk], tl.float32)
    d_scores = tl.zeros([chunk, chunk], tl.float32)
    by_lookup = tl.zeros([chunk, rank_wide], tl.float32)  # gradient of the keys, where they look up the state before
    by_end = tl.zeros([chunk, rank_wide], tl.float32)  # and where they are written into the state after
    d_q = tl.zeros([chunk, rank_wide], tl.float32)
    d_w = tl.zeros([chunk], tl.float32)
    d_last = 0.0  # by the sum of logarithms over the chunk
    for start in range(0, dim, dim_wide):
        state = load_rows(states + start, rows, rank, dim, dim - start, dim_wide)
        d_state = load_rows(d_states + start, rows, rank, dim, dim - start, dim_wide)
        d_last += all_kept * tl.sum(tl.sum(state * d_state, axis=1), axis=0)
        wrote = load_rows(error + flat + start, place, tokens, dim, dim - start, dim_wide)
        by_end += tl.dot(to_end[:, None] * wrote, tl.trans(d_state), input_precision=precision)
        if reads:
            d_out = load_rows(d_outputs + flat + start, place, tokens, dim, dim - start, dim_wide)
            d_scores += tl.dot(d_out, tl.trans(wrote), input_precision=precision)
            d_q += tl.dot(so_far[:, None] * d_out, tl.trans(state), input_precision=precision)
        d_ask = load_rows(asked + flat + start, place, tokens, dim, dim - start, dim_wide)
        d_system -= tl.dot(d_ask, tl.trans(wrote), input_precision=precision)
        by_lookup -= tl.dot(so_far[:, None] * d_ask, tl.trans(state), input_precision=precision)
        d_w += tl.sum(d_ask * load_rows(values + start, place, tokens, values_t, dim - start, dim_wide), axis=1)
        store_rows(d_values + flat + start, place, tokens, dim, dim - start, dim_wide, w[:, None] * d_ask)

    k = load_rows(row_of(keys, stream, heads, keys_b, keys_h), place, tokens, keys_t, rank, rank_wide)
    q = k
    scores = between
    if reads:
        q = load_rows(row_of(queries, stream, heads, queries_b, queries_h), place, tokens, queries_t, rank, rank_wide)
        scores = load_rows(scored + square, t, chunk, chunk, chunk, chunk)
    d_k, d_q, d_w, d_log = within(
        k, q, w, between, scores, d_system, d_scores, by_lookup, by_end, d_q, d_w, d_last, chunk, reads, precision
    )
    if reads:
        store_rows(d_queries + stream * tokens * rank, place, tokens, rank, rank, rank_wide, d_q)
    store_rows(d_keys + stream * tokens * rank, place, tokens, rank, rank, rank_wide, d_k)
    tl.store(d_write + stream * tokens + place, d_w, mask=place < tokens)
    tl.store(d_log_kept + stream * tokens + place, d_log, mask=place < tokens)
