"""What the Triton kernels of `kernel_passes` share: tiles in and out, decays, the triangle, the way back.

Importable without Triton, which torch's CUDA builds bring and its CPU builds do not; then nothing here can be called.
"""

# ruff: noqa: ANN001, ANN201 - a kernel's arguments are Triton's own; only what is fixed at compile time is annotated.

from __future__ import annotations

from typing import Any, no_type_check


def _as_it_is(function: Any) -> Any:
    return function


try:
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    jit: Any = triton.jit
except ImportError:
    tl: Any = None
    jit: Any = _as_it_is


# Types are not checked inside kernels: the tests' run-time checker would wrap what Triton has to read as source.
@jit
@no_type_check
def load_rows(pointer, place, rows, stride, start, width: tl.constexpr, wide: tl.constexpr):
    """Rows `place`, columns from `start`, of a matrix as float32, [len(place), wide]; 0 past its `rows` and `width`."""
    column = start + tl.arange(0, wide)
    inside = place[:, None] < rows
    if width % wide:  # a mask over columns would keep a thread from loading several at once
        inside = inside & (column[None, :] < width)
    return tl.load(pointer + place[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@jit
@no_type_check
def store_rows(pointer, place, rows, stride, start, width: tl.constexpr, wide: tl.constexpr, tile):
    """The reverse of `load_rows`, rounded to what `pointer` points to."""
    column = start + tl.arange(0, wide)
    inside = place[:, None] < rows
    if width % wide:
        inside = inside & (column[None, :] < width)
    tl.store(pointer + place[:, None] * stride + column[None, :], tile.to(pointer.dtype.element_ty), mask=inside)


@jit
@no_type_check
def load_matrix(
    pointer, start, height: tl.constexpr, width: tl.constexpr, high: tl.constexpr, wide: tl.constexpr
):  # fmt: skip
    """Columns from `start` of a float32 matrix [height, width] that lies in one piece, [high, wide]; 0 past its end."""
    row = tl.arange(0, high)[:, None]
    column = start + tl.arange(0, wide)[None, :]
    if height % high or width % wide:
        return tl.load(pointer + row * width + column, mask=(row < height) & (column < width), other=0.0)
    return tl.load(pointer + row * width + column)


@jit
@no_type_check
def store_matrix(
    pointer, start, height: tl.constexpr, width: tl.constexpr, high: tl.constexpr, wide: tl.constexpr, tile
):  # fmt: skip
    """The reverse of `load_matrix`."""
    row = tl.arange(0, high)[:, None]
    column = start + tl.arange(0, wide)[None, :]
    if height % high or width % wide:
        tl.store(pointer + row * width + column, tile, mask=(row < height) & (column < width))
    else:
        tl.store(pointer + row * width + column, tile)


@jit
@no_type_check
def load_square(pointer, size: tl.constexpr, wanted: tl.constexpr):
    """A float32 matrix [size, size]; 0 where it is not wanted, and then nothing is loaded."""
    if wanted:
        return load_matrix(pointer, 0, size, size, size, size)
    return tl.zeros([size, size], tl.float32)


@jit
@no_type_check
def position(chunks, chunk: tl.constexpr):
    """Of this program: the number of its chunk in its stream, the stream, and where the chunk's tokens stand in it."""
    number = tl.program_id(0) % chunks
    stream = (tl.program_id(0) // chunks).to(tl.int64)
    return number, stream, (number * chunk + tl.arange(0, chunk)).to(tl.int64)


@jit
@no_type_check
def row_of(pointer, stream, heads, batch_stride, head_stride):
    """Where the tokens of one head of one row of the batch start."""
    return pointer + (stream // heads).to(tl.int64) * batch_stride + (stream % heads).to(tl.int64) * head_stride


@jit
@no_type_check
def weights(write, log_kept, stream, place, tokens, chunk: tl.constexpr):
    """How strongly each token of a chunk is written, and decays.

    `between[t, s]` is what is left at t of something written at s <= t; then what is left of the start at each token,
    of each token at the end, and of the start at the end.
    """
    inside = place < tokens
    w = tl.load(write + stream * tokens + place, mask=inside, other=0.0)
    logs = tl.load(log_kept + stream * tokens + place, mask=inside, other=0.0)
    # Sums over the tokens in between, not differences of sums from the start: those lose digits where decay is strong.
    t = tl.arange(0, chunk)
    since = tl.where(t[:, None] > t[None, :], logs[:, None], 0.0)
    between = tl.where(t[:, None] >= t[None, :], tl.exp(tl.cumsum(since, axis=0)), 0.0)
    so_far = tl.exp(tl.cumsum(logs, axis=0))
    return w, between, so_far, tl.exp(tl.sum(since, axis=0)), tl.exp(tl.sum(logs, axis=0))


@jit
@no_type_check
def inverse(system, size: tl.constexpr, precision: tl.constexpr):
    """Of I + `system`, which is strictly lower triangular, [size, size], size 16, 32 or 64.

    Diagonal blocks, twice as wide at each step: the inverse of [[P, 0], [F, Q]] has -Q^-1 F P^-1 below the diagonal. So
    there is no loop over rows; and with unit keys no entry of any of these inverses exceeds max(1, write) (README.md),
    so nothing cancels, as it would in the series I - L + L^2 - ...
    """
    blocks: tl.constexpr = size // 16
    same = tl.arange(0, blocks)[:, None, None, None] == tl.arange(0, blocks)[None, None, :, None]
    small = tl.sum(tl.where(same, tl.reshape(system, [blocks, 16, blocks, 16]), 0.0), axis=2)
    row = tl.arange(0, 16)[None, :, None]
    column = tl.arange(0, 16)[None, None, :]
    found = tl.where(row == column, 1.0, 0.0) - tl.where(row // 2 == column // 2, small, 0.0)
    for level in tl.static_range(1, 4):
        apart = (row >> level) != (column >> level)
        joined = (row >> (level + 1)) == (column >> (level + 1))
        below = tl.where(joined & apart, small, 0.0)
        found -= tl.dot(found, tl.dot(below, found, input_precision=precision), input_precision=precision)
    whole = tl.reshape(tl.where(same, found[:, :, None, :], 0.0), [size, size])
    row = tl.arange(0, size)[:, None] // 16
    column = tl.arange(0, size)[None, :] // 16
    if size >= 32:
        below = tl.where((row > column) & (row // 2 == column // 2), system, 0.0)
        whole -= tl.dot(whole, tl.dot(below, whole, input_precision=precision), input_precision=precision)
    if size == 64:
        below = tl.where(row // 2 > column // 2, system, 0.0)
        whole -= tl.dot(whole, tl.dot(below, whole, input_precision=precision), input_precision=precision)
    return whole


@jit
@no_type_check
def solve(keys, write, between, chunk: tl.constexpr, precision: tl.constexpr):
    """M^-1 of a chunk, M = I + tril(write * between * keys keys^T, -1): from what was asked to what is written."""
    t = tl.arange(0, chunk)
    overlap = tl.dot(keys, tl.trans(keys), input_precision=precision)
    system = tl.where(t[:, None] > t[None, :], write[:, None] * between * overlap, 0.0)
    return inverse(system, chunk, precision)


@jit
@no_type_check
def written(
    k, value, state, d_state, d_out, solution, scores, w, so_far, to_end, reads: tl.constexpr, precision: tl.constexpr
):  # fmt: skip
    """What each token of a chunk wrote, and the gradient of what it was asked to write, for some columns."""
    wrote = value - so_far[:, None] * tl.dot(k, state, input_precision=precision)
    wrote = tl.dot(solution, w[:, None] * wrote, input_precision=precision)
    d_wrote = to_end[:, None] * tl.dot(k, d_state, input_precision=precision)
    if reads:
        d_wrote += tl.dot(tl.trans(scores), d_out, input_precision=precision)
    return wrote, tl.dot(tl.trans(solution), d_wrote, input_precision=precision)


@jit
@no_type_check
def within(
    k, q, w, between, scores, d_system, d_scores, by_lookup, by_end, d_q, d_w, d_last,
    chunk: tl.constexpr, reads: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's keys, queries, writes and logarithms of decays, from those of its two triangles.

    `by_lookup` is the keys' gradient where they look up the state before, less the write; `by_end` where they are
    written into the state after; `d_q` and `d_w` come without the triangles' share.
    """
    t = tl.arange(0, chunk)
    at_end = tl.sum(by_end * k, axis=1)
    looked_up = tl.sum(by_lookup * k, axis=1)
    d_system = tl.where(t[:, None] > t[None, :], d_system * between, 0.0)
    through = d_system * tl.dot(k, tl.trans(k), input_precision=precision)
    d_w += looked_up + tl.sum(through, axis=1)
    d_total = w * looked_up  # by the sum of logarithms up to each token
    through = w[:, None] * through
    d_system = w[:, None] * d_system
    d_k = by_end + w[:, None] * by_lookup
    d_k += tl.dot(d_system + tl.trans(d_system), k, input_precision=precision)
    if reads:
        d_total += tl.sum(d_q * q, axis=1)
        through += d_scores * scores
        d_scores = d_scores * between
        d_q += tl.dot(d_scores, k, input_precision=precision)
        d_k += tl.dot(tl.trans(d_scores), q, input_precision=precision)
    # A token's decay acts on all that was written before it and is read at it or later.
    through = tl.cumsum(through, axis=0, reverse=True) + at_end[None, :]
    through = tl.sum(tl.where(t[:, None] > t[None, :], through, 0.0), axis=1)
    return d_k, d_q, d_w, tl.cumsum(d_total, axis=0, reverse=True) + through + d_last
