"""The delta rule over a stream of tokens in Triton, for NVIDIA GPUs; differentiable in everything it is given.

The same function as the delta rule in `chunk`, which is its plain form and runs everywhere else. Derivation and what is
kept for the backward pass: README.md beside this file, "On a GPU".
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from cortex_core.fast_weights import kernel_passes as passes
from cortex_core.fast_weights.kernel_table import TABLE, Cut, Precision

MAX_RANK = 128  # above, a program's tiles no longer fit into an SM's registers and shared memory


def delta_rule(
    keys: Float[Tensor, "batch heads tokens rank"],
    queries: Float[Tensor, "batch heads tokens rank"],
    values: Float[Tensor, "batch heads tokens head_dim"],
    write: Float[Tensor, "batch heads tokens"],
    ticks: Float[Tensor, "batch heads tokens"],
    log_decay: Float[Tensor, " heads"],
    initial: Float[Tensor, "batch heads rank head_dim"],
    chunk_size: int = 64,
    *,
    read: bool = True,
    precision: Precision | None = None,
) -> tuple[Float[Tensor, "batch heads tokens head_dim"] | None, Float[Tensor, "batch heads rank head_dim"]]:
    """Decay, write, read, for all tokens. Returns what each token reads (None without `read`) and the final state.

    Keys and queries of unit length; keys, queries and values float32 or bfloat16, outputs and gradients like them; the
    rest float32, and so is every sum inside. `chunk_size` changes the speed alone, and is only an upper bound.
    `precision` is that of the products: "tf32x3", three passes of the tensor cores, is float32 but for the last bits,
    and the default; "tf32", one pass with 11 bits, is that of bfloat16, which has 8; "ieee" is float32, slowly.
    """
    assert keys.shape[-1] <= MAX_RANK, keys.shape
    log_kept = ticks.float() * log_decay.float()[:, None]
    precision = precision or ("tf32x3" if keys.dtype == torch.float32 else "tf32")
    cut = TABLE[precision, max(16, _power_of_two(keys.shape[-1]))]
    cut = cut._replace(chunk=max(16, min(cut.chunk, _power_of_two(chunk_size), _power_of_two(keys.shape[2]))))
    out, final = _DeltaRule.apply(  # type: ignore[misc]
        keys, queries, values, write.float(), log_kept, initial.float(), cut, read, precision
    )
    return (out if read else None), final


class _Launch(NamedTuple):
    """Sizes that the passes of one call share."""

    batch: int
    heads: int
    tokens: int
    rank: int
    dim: int
    cut: Cut
    reads: bool
    precision: Precision

    @property
    def streams(self) -> int:
        return self.batch * self.heads

    @property
    def chunk(self) -> int:
        return self.cut.chunk

    @property
    def chunks(self) -> int:
        return -(-self.tokens // self.chunk)

    def options(self, name: str) -> dict[str, Any]:
        """What a pass is compiled for: padded sizes, a power of two at least 16, the least that a product takes; and
        one stage, as a second one would double the shared memory, and programs hide each other's loads."""
        warps, columns = getattr(self.cut, name)
        return {
            "rank_wide": max(16, _power_of_two(self.rank)),
            "dim_wide": min(columns, max(16, _power_of_two(self.dim))),
            "precision": self.precision,
            "num_warps": warps,
            "num_stages": 1,
        }

    def columns(self, name: str) -> int:
        """Programs side by side in a pass that takes so many columns each."""
        return -(-self.dim // self.options(name)["dim_wide"])


class _DeltaRule(torch.autograd.Function):
    """Keeps its inputs and the states between chunks; the triangles are solved again on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        keys: Tensor,
        queries: Tensor,
        values: Tensor,
        write: Tensor,
        log_kept: Tensor,
        initial: Tensor,
        cut: Cut,
        reads: bool,
        precision: Precision,
    ) -> tuple[Tensor, Tensor]:
        keys, queries, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, queries, values))
        write, log_kept = write.contiguous(), log_kept.contiguous()
        batch, heads, tokens, rank = keys.shape
        launch = _Launch(batch, heads, tokens, rank, values.shape[-1], cut, reads, precision)
        with torch.cuda.device_of(keys):
            out, states = _forward(launch, keys, queries, values, write, log_kept, initial)
        ctx.save_for_backward(keys, queries, values, write, log_kept, states)
        ctx.launch = launch
        return out, states[:, -1].reshape(initial.shape).clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        with torch.cuda.device_of(grads[1]):
            return (*_backward(ctx.launch, *ctx.saved_tensors, *grads), None, None, None)


def _forward(
    launch: _Launch, keys: Tensor, queries: Tensor, values: Tensor, write: Tensor, log_kept: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor]:
    states = _states(launch, initial)
    states[:, 0] = initial.reshape(states[:, 0].shape)
    given = (launch.streams, launch.tokens)
    reach, partial = (
        (write.new_empty(*given, launch.rank), write.new_empty(*given, launch.dim)) if launch.reads else (write, write)
    )
    erased, kept = _prepare(launch, keys, queries, values, write, log_kept, states, reach, partial)
    _carry(launch, erased, kept, states, backward=False)
    if not launch.reads:
        return values.new_empty(0), states
    out = partial if values.dtype == torch.float32 else torch.empty_like(partial, dtype=values.dtype)
    passes.read[(launch.streams * launch.chunks, launch.columns("read"))](
        reach, states, partial, out, launch.tokens, launch.chunks,
        launch.rank, launch.dim, launch.chunk, **launch.options("read"),
    )  # fmt: skip
    return out.view(launch.batch, launch.heads, launch.tokens, launch.dim), states


def _backward(
    launch: _Launch,
    keys: Tensor,
    queries: Tensor,
    values: Tensor,
    write: Tensor,
    log_kept: Tensor,
    states: Tensor,
    d_out: Tensor,
    d_final: Tensor,
) -> tuple[Tensor | None, ...]:
    d_states = _states(launch, d_final)
    d_states[:, -1] = d_final.reshape(d_states[:, -1].shape)
    if launch.reads:
        d_out = d_out.contiguous()
    else:
        d_states[:, :-1] = 0.0
    solved, scored = write.new_empty(2, launch.streams * launch.chunks, launch.chunk, launch.chunk)
    erased, kept = _prepare(launch, keys, queries, d_out, write, log_kept, d_states, write, write, solved, scored)
    _carry(launch, erased, kept, d_states, backward=True)
    d_keys, d_queries, d_values = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (keys, queries, values)
    )
    d_write, d_log_kept = torch.empty_like(write), torch.empty_like(log_kept)
    alone = launch.cut.errors is None
    error, asked = (write, write) if alone else write.new_empty(2, launch.streams, launch.tokens, launch.dim)
    if not alone:
        passes.errors[(launch.streams * launch.chunks, launch.columns("errors"))](
            keys, values, write, log_kept, solved, scored, states, d_states, d_out, error, asked,
            *keys.stride()[:3], *values.stride()[:3], launch.heads, launch.tokens, launch.chunks,
            launch.rank, launch.dim, launch.chunk, reads=launch.reads, **launch.options("errors"),
        )  # fmt: skip
    passes.gradients[(launch.streams * launch.chunks,)](
        keys, queries, values, write, log_kept, solved, scored, states, d_states, d_out, error, asked,
        d_keys, d_queries, d_values, d_write, d_log_kept,
        *keys.stride()[:3], *queries.stride()[:3], *values.stride()[:3],
        launch.heads, launch.tokens, launch.chunks,
        launch.rank, launch.dim, launch.chunk, reads=launch.reads, alone=alone, **launch.options("gradients"),
    )  # fmt: skip
    d_initial = d_states[:, 0].reshape(d_final.shape)
    return d_keys, d_queries if launch.reads else None, d_values, d_write, d_log_kept, d_initial


def _prepare(
    launch: _Launch,
    keys: Tensor,
    queries: Tensor,
    columns: Tensor,
    write: Tensor,
    log_kept: Tensor,
    states: Tensor,
    reach: Tensor,
    partial: Tensor,
    solved: Tensor | None = None,
    scored: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    erased = write.new_empty(launch.streams * launch.chunks, launch.rank, launch.rank)
    kept = write.new_empty(launch.streams * launch.chunks)
    strides = columns.stride()[:3] if columns.dim() == 4 else (0, 0, 0)
    passes.prepare[(launch.streams * launch.chunks,)](
        keys, queries, columns, write, log_kept,
        erased, kept, reach, write if solved is None else solved, write if scored is None else scored, states, partial,
        *keys.stride()[:3], *queries.stride()[:3], *strides,
        launch.heads, launch.tokens, launch.chunks,
        launch.rank, launch.dim, launch.chunk, reads=launch.reads, backward=solved is not None,
        **launch.options("prepare" if solved is None else "prepare_backward"),
    )  # fmt: skip
    return erased, kept


def _carry(launch: _Launch, erased: Tensor, kept: Tensor, states: Tensor, *, backward: bool) -> None:
    name = "carry_backward" if backward else "carry"
    passes.carry[(launch.streams, launch.columns(name))](
        erased, kept, states, launch.chunks, launch.rank, launch.dim, backward=backward, **launch.options(name)
    )


def _states(launch: _Launch, like: Tensor) -> Tensor:
    return like.new_empty(launch.streams, launch.chunks + 1, launch.rank, launch.dim)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


@cache
def _triton_is_here() -> bool:
    return importlib.util.find_spec("triton") is not None


def usable(device: torch.device, rank: int) -> bool:
    """Whether `delta_rule` runs there: an NVIDIA GPU of compute capability 8.0 or higher, and Triton.

    CORTEX_KERNEL=off in the environment says no: to compare with the plain form.
    """
    if device.type != "cuda" or rank > MAX_RANK or os.environ.get("CORTEX_KERNEL") == "off":
        return False
    return torch.version.cuda is not None and _triton_is_here() and torch.cuda.get_device_capability(device) >= (8, 0)
