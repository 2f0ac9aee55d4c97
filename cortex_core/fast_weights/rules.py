"""The write rules token by token: the oracle for the parallel forms, and what generation runs.

Equations and symbols: README.md beside this file.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from cortex_core.fast_weights.signals import surprise
from cortex_core.fast_weights.state import FastWeights


class Dose(NamedTuple):
    """What the gates make of some tokens. 0 and 0 at padding."""

    write: Float[Tensor, "batch heads tokens"]
    """How strongly each is written, 0 to `write_strength`."""
    ticks: Float[Tensor, "batch heads tokens"]
    """How often each decays the state: its gate (decay per write), or 1 (decay per token)."""
    idle: Float[Tensor, "batch heads tokens"] | None = None
    """Full ticks of tokens that stood just before each and wrote nothing; None where every token is there itself."""


@runtime_checkable
class Gate(Protocol):
    """Decides on tokens once it is told how surprising they are."""

    needs_surprise: bool

    def __call__(self, surprise: Float[Tensor, "batch heads tokens"] | None, now: slice) -> Dose:
        """Doses of the tokens `now`. `surprise` may be None if it is not needed."""
        ...


class Rule(NamedTuple):
    """Which recurrence, and its constants."""

    log_decay: Float[Tensor, " heads"]
    """ln of what one tick leaves of the older state, at most 0."""
    hebbian: bool = False
    """False: the delta rule. True: the Hebbian rule, whose way into the key space moves."""
    anti_hebbian: float = 0.0
    """Share of the state that one tick's anti-Hebbian term takes (beta in the source)."""
    slow: bool = True
    """Hebbian: whether `down` is added to the identity (key_dim = rank) or stands alone, as in the source."""
    clamp: bool = False
    """Hebbian: whether the anti-Hebbian term is clamped to -1 .. 1, as in the source."""

    @property
    def log_idle(self) -> Float[Tensor, " heads"]:
        """ln of what a token that counts as a tick and writes nothing leaves of the state."""
        return self.log_decay + math.log1p(-self.anti_hebbian) if self.hebbian else self.log_decay

    def faded(self, state: FastWeights, ticks: Float[Tensor, "batch heads"]) -> FastWeights:
        """`state` after as many tokens that wrote nothing. Exact for the clamped rule while entries lie in -1 .. 1."""
        kept = (ticks * self.log_idle).exp()[..., None, None]
        return state.map(lambda part: part * kept)

    def project(self, x: Float[Tensor, "*shape key_dim"], state: FastWeights) -> Float[Tensor, "*shape rank"]:
        """Keys or queries into the key space as `state` has it."""
        if not self.hebbian:
            return x
        assert state.down is not None
        return x + x @ state.down if self.slow else x @ state.down

    def predict(
        self, keys: Float[Tensor, "batch heads tokens key_dim"], state: FastWeights
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """What the memory holds under each key."""
        return self.project(keys, state) @ state.up


def step_by_step(
    rule: Rule,
    keys: Float[Tensor, "batch heads tokens key_dim"],
    queries: Float[Tensor, "batch heads tokens key_dim"],
    values: Float[Tensor, "batch heads tokens head_dim"],
    gate: Gate,
    initial: FastWeights,
    anchor: FastWeights,
) -> tuple[Float[Tensor, "batch heads tokens head_dim"], FastWeights]:
    """Decay, write, read, one token after the other, within one segment that began with the state `anchor`.

    `keys` and `queries` have unit length. `anchor` is what surprise is measured against, `initial` the state before the
    first of these tokens: equal, unless the segment goes on from an earlier call.
    """
    state, outputs = initial, []
    write = _hebbian_write if rule.hebbian else _delta_write
    for t in range(keys.shape[2]):
        now = slice(t, t + 1)
        k, v = keys[:, :, now], values[:, :, now]
        dose = gate(surprise(v, rule.predict(k, anchor)) if gate.needs_surprise else None, now)
        if dose.idle is not None:
            state = rule.faded(state, dose.idle[:, :, 0])
        state = write(rule, k, v, Dose(dose.write[..., None], dose.ticks[..., None]), state)
        outputs.append(rule.project(queries[:, :, now], state) @ state.up)
    return torch.cat(outputs, dim=2), state


def _delta_write(rule: Rule, k: Tensor, v: Tensor, dose: Dose, state: FastWeights) -> FastWeights:
    kept = state.up * (dose.ticks * rule.log_decay[:, None, None]).exp()
    return FastWeights(kept + k.transpose(-1, -2) @ (dose.write * (v - k @ kept)))


def _hebbian_write(rule: Rule, k: Tensor, v: Tensor, dose: Dose, state: FastWeights) -> FastWeights:
    kept = state.map(lambda part: part * (dose.ticks * rule.log_decay[:, None, None]).exp())
    assert kept.down is not None
    addressed = rule.project(k, kept)
    taken = rule.anti_hebbian * dose.ticks

    def against(part: Tensor) -> Tensor:
        return taken * (part.clamp(-1.0, 1.0) if rule.clamp else part)

    written = dose.write * k.transpose(-1, -2)
    return FastWeights(
        kept.up + addressed.transpose(-1, -2) @ (dose.write * v) - against(kept.up),
        kept.down + written @ addressed - against(kept.down),
    )
