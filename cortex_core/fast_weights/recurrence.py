"""The one thing that must go from chunk to chunk in order: S_n = A_n S_(n-1) + B_n, two small products per chunk."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def linear_recurrence(
    transition: Float[Tensor, "batch heads chunks rows rows"],
    added: Float[Tensor, "batch heads chunks rows columns"],
    initial: Float[Tensor, "batch heads rows columns"],
) -> Float[Tensor, "batch heads chunks+1 rows columns"]:
    """All states, the initial one first. Differentiable once."""
    if transition.shape[2] == 1:
        return torch.stack([initial, transition[:, :, 0] @ initial + added[:, :, 0]], dim=2)
    return _LinearRecurrence.apply(transition, added, initial)  # type: ignore[return-value]


class _LinearRecurrence(torch.autograd.Function):
    """One product per chunk in either direction; through autograd's own graph it would be six."""

    @staticmethod
    def forward(ctx: Any, transition: Tensor, added: Tensor, initial: Tensor) -> Tensor:
        batch, heads, chunks, rows, columns = added.shape
        a = transition.movedim(2, 0).reshape(chunks, batch * heads, rows, rows)
        b = added.movedim(2, 0).reshape(chunks, batch * heads, rows, columns)
        states = added.new_empty(chunks + 1, batch * heads, rows, columns)
        states[0] = initial.reshape(batch * heads, rows, columns)
        for n in range(chunks):
            torch.baddbmm(b[n], a[n], states[n], out=states[n + 1])
        ctx.save_for_backward(a, states)
        return states.view(chunks + 1, batch, heads, rows, columns).movedim(0, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, states = ctx.saved_tensors
        batch, heads, chunks, rows, columns = grads[0].shape
        given = grads[0].movedim(2, 0).reshape(chunks, batch * heads, rows, columns)
        backward = a.transpose(-1, -2)
        through = torch.empty_like(states[1:])  # the gradient of each state but the first
        through[-1] = given[-1]
        for n in range(chunks - 2, 0, -1):
            torch.baddbmm(given[n], backward[n], through[n], out=through[n - 1])
        first = torch.baddbmm(given[0], backward[0], through[0])
        shape = (chunks - 1, batch, heads, rows)
        return (
            (through @ states[:-1].transpose(-1, -2)).view(*shape, rows).movedim(0, 2),
            through.view(*shape, columns).movedim(0, 2),
            first.view(batch, heads, rows, columns),
        )
