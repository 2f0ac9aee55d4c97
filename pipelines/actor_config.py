"""Settings of the actors beside training: those that generate samples, and the one that sleeps."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from cortex_core.config import NonNegative, PositiveInt, Settings

Seconds = Annotated[float, Field(gt=0.0, le=604_800.0)]


class CrewConfig(Settings):
    """When an actor counts as lost, and how it is replaced."""

    timeout_s: Seconds = 600.0
    """Seconds that one call may take; an actor that takes longer is ended and replaced, its work done by another."""
    start_timeout_s: Seconds = 300.0
    """Seconds until a new actor answers: it has to be placed, and to load what it works with."""
    max_restarts: Annotated[int, Field(ge=-1)] = 3
    """Losses in a row, without an answer in between, after which an actor counts as hopeless. When all of them do,
    training ends with the reason; one of several is tried again now and then. Also how many actors the same piece of
    work may take with it. -1 is no limit."""
    backoff_s: NonNegative = 1.0
    """Pause before the second replacement in a row, in seconds; each further one doubles it, up to a minute. The first
    comes at once."""
    num_cpus: NonNegative = 1.0
    """CPUs that Ray reserves for an actor."""
    num_gpus: NonNegative = 0.0
    """GPUs that Ray reserves for an actor; a fraction shares one."""

    @property
    def patience_s(self) -> float:
        """Until an actor that dies as often as it may would have been replaced."""
        return (self.timeout_s + self.start_timeout_s) * (1 + max(self.max_restarts, 0))


class PoolConfig(CrewConfig):
    """Actors that generate samples for training."""

    num_generators: PositiveInt = 2
    """Actors that generate side by side."""
    queue_items: PositiveInt = 256
    """Samples at most that wait for training or are being generated: with as many, generators pause. Where they are
    quicker than training, fewer makes the samples fresher."""
    max_staleness: Annotated[int, Field(ge=0)] = 4
    """Versions of the weights that a sample may lie behind when training takes it. 0: training waits for samples of
    its own weights, in an order that does not depend on the generators. More lets both sides work at once."""
    tickets_per_call: PositiveInt = 1
    """Samples at most that a generator makes in one call: a batch for its hardware. All of them come together."""

    @model_validator(mode="after")
    def a_call_fits_the_queue(self) -> PoolConfig:
        """The samples of a call need room in the queue when they come."""
        if self.tickets_per_call > self.queue_items:
            raise ValueError(
                f"tickets_per_call = {self.tickets_per_call}: must be at most {self.queue_items}, queue_items. "
                "Lower it, or raise queue_items"
            )
        return self


class NightsConfig(CrewConfig):
    """The actor that sleeps while training goes on."""

    synchronous: bool = False
    """Training waits for every night. It is then what it would be without an actor, and the same each time; with dreams
    (`sleep.dream_frac`), if `dream_actors.max_staleness` is 0."""
    max_staleness: Annotated[int, Field(ge=0)] = 1
    """Versions of the slow weights that a night may lie behind when it is merged: how often they were changed since it
    was handed in. 0 merges only what was learned from the weights as they are."""
    queue_nights: PositiveInt = 4
    """Nights that may wait, the one that is being slept and those not yet merged included."""
    max_tries: PositiveInt = 3
    """How often lessons are handed in, if their nights come too late or are refused, until they are given up."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the nights. The same seed, number of the night and try give the same random numbers."""
