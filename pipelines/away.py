"""A reader whose nights are slept by an actor and whose dreams are dreamed by others, while training goes on.

All workers have one and read the same; the actors belong to the first, which tells the others what came of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from cortex_core import files
from cortex_core.consolidation.sleep import Evening, add, slow_values
from cortex_core.consolidation.sleeper import Sleeper, Slept
from cortex_core.dreaming.dream import Dream
from cortex_core.errors import DataError
from cortex_core.training.dreams import Dreams
from pipelines.actor_config import NightsConfig
from pipelines.nights import Nights, Verdict
from pipelines.pool import Pool

SCHEMA = "cortex-away/1"
AWAY = "away.safetensors"
FromFirst = Callable[[Any], Any]
"""What the first worker gives, on every worker."""


class _Slept(NamedTuple):
    """A night that is to be added, before anybody has said whether it stays."""

    delta: Mapping[str, Tensor]


class _Settled(NamedTuple):
    """What has become of a night."""

    number: int
    verdict: Verdict


class AwaySleeper(Sleeper):
    """`read` hands nights in, `settle` merges those that have been slept; in between the model is what it was."""

    def __init__(
        self, *args: Any, nights: Nights | None, config_of_nights: NightsConfig, from_first: FromFirst,
        patience_s: float, **kwargs: Any,
    ) -> None:  # fmt: skip
        """`nights` on the first worker, None on the others; no night is waited for longer than `patience_s`. The rest
        as of `Sleeper`."""
        super().__init__(*args, **kwargs)
        self._nights, self._away_config, self._from_first = nights, config_of_nights, from_first
        self._patience_s = patience_s
        # Of sidecars that are trained on, and of a backbone in however many shards: the checkpoint knows whose it is.
        self.session.identity = {}
        self._away: dict[int, Evening] = {}
        self._next = 0
        self.version = 0
        """How often the slow weights have been changed."""

    @property
    def num_away(self) -> int:
        """Nights that have been handed in and not been settled."""
        return len(self._away)

    @property
    def num_handed_in(self) -> int:
        """Nights that were handed in so far."""
        return self._next

    @property
    def num_over(self) -> int:
        """Of those, how many have been settled before the first that has not."""
        return min(self._away, default=self._next)

    def evening(self) -> tuple[Evening, dict[str, float]]:
        """As of `Sleeper`, and the same on all workers, to the bit."""
        evening, metrics = super().evening()
        tensors = self._from_first(evening.tensors())
        return Evening.from_tensors(tensors, self.model.backbone.device), metrics

    def _cues(self) -> list[list[int]]:
        return self._from_first(super()._cues())

    def sleep(self) -> Slept:
        """Hand in what the day has to teach. A synchronous night is settled when this returns; nothing is known yet of
        another one, which counts as kept."""
        while len(self._away) >= self._away_config.queue_nights:
            self.settle(wait=True)
        evening, metrics = self.evening()
        if not len(evening.tonight):
            self.morning(evening, kept=True)
            return Slept(metrics, kept=True)
        self._away[self._next] = evening
        if self._nights is not None:
            number = self._nights.submit(self.version, self._snapshot(), evening.tensors())
            assert number == self._next
        self._next += 1
        if not self._away_config.synchronous:
            return Slept(metrics, kept=True)
        undone = self.num_undone
        while self._away:
            self.settle(wait=True)
        kept = self.num_undone == undone
        return Slept(metrics | {"sleep/undone": float(not kept)}, kept)

    def settle(self, *, wait: bool = False) -> bool:
        """Merge a night that has been slept, or find out why not; False if there is none. With `wait` there will be.

        Raises TimeoutError, and RuntimeError when the actor is lost for good.
        """
        if not self._away:
            return False
        settled = self._settle_first(wait) if self._nights is not None else self._settle_other()
        if settled is None:
            return False
        merged, given_up = settled.verdict.merged, settled.verdict.given_up
        self.version += merged
        if merged or given_up:
            self.morning(self._away.pop(settled.number), kept=merged)
        return True

    def _settle_first(self, wait: bool) -> _Settled | None:
        assert self._nights is not None
        night = self._nights.wait(self._patience_s) if wait else self._nights.poll()
        if night is None:
            return self._from_first(None)

        def agrees() -> bool:
            self._from_first(_Slept(night.delta))
            return self._agrees()

        verdict = self._nights.merge(night, slow_values(self.model), self.version, agrees, self._snapshot)
        return self._from_first(_Settled(night.number, verdict))

    def _settle_other(self) -> _Settled | None:
        heard = self._from_first(None)
        if not isinstance(heard, _Slept):
            return heard
        values = slow_values(self.model)
        before = {name: value.detach().clone() for name, value in values.items()}
        add(self.model, heard.delta)
        self._agrees()  # takes part in measuring; the first one's figure counts
        settled = self._from_first(None)
        if not settled.verdict.merged:
            for name, value in values.items():
                value.data.copy_(before[name])
        return settled

    def _agrees(self) -> bool:
        return self.guard is None or self.guard.allows(self.guard.drift(self.model))

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.model.sidecars.state_dict().items()}

    def save(self, folder: str | Path) -> None:
        """As of `Sleeper`, with the nights that are away. On the first worker."""
        assert self._nights is not None
        super().save(folder)
        tensors = {f"{n:06d}/{name}": v for n, evening in self._away.items() for name, v in evening.tensors().items()}
        state = self._nights.state_dict()
        tries = {str(work["number"]): work["tries"] for work in state["pending"]}
        notes = {"version": self.version, "next": self._next, "tries": tries}
        if isinstance(self.dreams, PooledDreams):
            notes |= {"pool": self.dreams.pool_state()}
        files.write(Path(folder) / AWAY, SCHEMA, tensors, notes)

    def load(self, folder: str | Path) -> None:
        """As of `Sleeper`; nights that were away are handed in again, as they were."""
        path = Path(folder) / AWAY
        found, notes = files.read(path, SCHEMA, "nights")
        away: dict[int, dict[str, Tensor]] = {}
        try:
            for key, value in found.items():
                number, _, name = key.partition("/")
                away.setdefault(int(number), {})[name] = value
            version, following = int(notes["version"]), int(notes["next"])
            pending = [{"number": n, "tries": int(notes["tries"][str(n)]), "lessons": away[n]} for n in sorted(away)]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: {type(error).__name__}: {error}; it is damaged") from error
        super().load(folder)
        device = self.model.backbone.device
        self._away = {number: Evening.from_tensors(tensors, device) for number, tensors in away.items()}
        self.version, self._next = version, following
        if self._nights is not None:
            self._nights.load_state_dict({"next": following, "pending": pending}, version, self._snapshot())
        if isinstance(self.dreams, PooledDreams):
            self.dreams.load_pool_state(notes.get("pool"))


class PooledDreams(Dreams):
    """Dreams that a pool of actors makes; it belongs to the first worker."""

    def __init__(self, *args: Any, pool: Pool | None, patience_s: float, from_first: FromFirst) -> None:
        """`pool` on the first worker, None on the others; no dream is waited for longer than `patience_s`. The rest as
        of `Dreams`."""
        super().__init__(*args)
        self._pool, self._patience_s, self._from_first = pool, patience_s, from_first
        self._version = 0

    def made(self, number: int) -> list[Dream]:
        """From the memories and the sidecars as they are, or as they were some nights ago if the pool may be so late.

        Raises TimeoutError, and RuntimeError when all generators are lost for good.
        """
        self._version += 1
        if self._pool is None:
            return self._from_first(None)
        weights = {name: value.detach().cpu() for name, value in self.model.sidecars.state_dict().items()}
        self._pool.publish(self._version, (weights, self.graph))
        return self._from_first([sample.value for sample in self._pool.take(number, self._patience_s)])

    def pool_state(self) -> dict[str, Any]:
        """Which dreams have been taken, and how often weights were published; for JSON."""
        assert self._pool is not None
        return {"version": self._version, "ledger": self._pool.state_dict()}

    def load_pool_state(self, state: Any) -> None:
        """Go on from `pool_state`. Raises DataError."""
        try:
            self._version = int(state["version"])
            ledger = state["ledger"]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{AWAY}: it has no pool of dreams ({error}); it is damaged, or from a run without"
            ) from error
        if self._pool is not None:
            self._pool.load_state_dict(ledger)
