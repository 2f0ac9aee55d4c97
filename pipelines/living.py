"""A life beside training: after every step a part of it is read, and its nights and dreams come from actors.

The sidecars learn on, but their addresses stay where they are (`keep_addresses`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cortex_core.backbone.load import load_tokenizer
from cortex_core.backbone.model import Cortex
from cortex_core.consolidation.spread import fitted
from cortex_core.tasks.corpus import Corpus
from cortex_core.tasks.filler import TextFiller
from cortex_core.tasks.vocabulary import TaskVocabulary
from cortex_core.training.life import Day, Life, new_sleeper
from pipelines.actor_config import CrewConfig
from pipelines.away import AwaySleeper, PooledDreams
from pipelines.beside import open_nights, open_pool
from pipelines.coding import night_codes
from pipelines.config import RunConfig
from pipelines.dreaming import source
from pipelines.life_history import History, document_of
from pipelines.nights import Nights
from pipelines.pool import Pool
from pipelines.slow_actor import consolidator

if TYPE_CHECKING:
    from pipelines.worker import Edge

DREAM_ACTORS = "dream_actors"
"""Before the metrics of the pool; `dream/` are those of the dreams themselves."""
PATIENT_FRAC = 0.9


@contextmanager
def opened(
    config: RunConfig, edge: Edge, model: Cortex, corpus: Corpus, backbone: str, after_backward: Callable[[], None]
) -> Iterator[Living | None]:
    """The life of a run, with its actors; None if it has none. Before `model` is replicated."""
    if not config.life.beside_training:
        yield None
        return
    with ExitStack() as actors:
        nights: Nights | None = None
        pool: Pool | None = None
        dreaming = config.sleep.dream_frac > 0
        if edge.rank == 0:
            nights = actors.enter_context(open_nights(consolidator(config), config.sleep_actor))
            if dreaming:
                pool = actors.enter_context(open_pool(source(config), config.dream_actors, name=DREAM_ACTORS))
        yield Living(config, edge, model, corpus, backbone, after_backward, nights, pool)


def keep_addresses(model: Cortex) -> None:
    """Training leaves the addresses of the memory as they are from here on: slow weights are found under them."""
    for sidecar in model.sidecars_by_layer.values():
        sidecar.addresses.requires_grad_(False)


class Living:
    """A life that is as far as training is. Every worker has one; the actors are the first one's."""

    def __init__(
        self, config: RunConfig, edge: Edge, model: Cortex, corpus: Corpus, backbone: str,
        after_backward: Callable[[], None], nights: Nights | None, pool: Pool | None,
    ) -> None:  # fmt: skip
        """`model` gets slow weights, unless it has some. Raises ConfigError, DataError."""
        tokenizer = load_tokenizer(config.backbone)

        def common(actors: CrewConfig) -> dict[str, Any]:
            # The other workers wait for the first: it is to say what is wrong before they count as hanging.
            patience_s = min(actors.patience_s, PATIENT_FRAC * config.cluster.hang_timeout_s)
            return {"from_first": edge.from_first, "patience_s": patience_s}

        dreams: dict[str, Any] = {}
        if config.sleep.dream_frac:
            dreams = {"dreams": partial(PooledDreams, pool=pool, **common(config.dream_actors))}
        sleeper = new_sleeper(
            model, lambda text: tokenizer(text, add_special_tokens=False).input_ids, corpus, config.sleep,
            config.replay, config.dream, after_backward, fisher=config.fisher, scaling=config.scaling,
            codes=night_codes(config, model, backbone),
            kind=partial(
                AwaySleeper, nights=nights, config_of_nights=config.sleep_actor, **common(config.sleep_actor)
            ),
            **dreams,
        )  # fmt: skip
        assert isinstance(sleeper, AwaySleeper)
        self.sleeper: AwaySleeper = sleeper
        for value in fitted(model).values():  # equal sums in another order may differ in a bit
            value.copy_(edge.from_first(value.cpu()))
        vocabulary = TaskVocabulary.from_tokenizer(tokenizer)
        self.life = Life(self.sleeper, config.life, vocabulary, TextFiller(corpus, "held_out"))
        self.history = History(self.life)
        self._nights, self._pool, self._corpus = nights, pool, corpus
        self._tokens = config.evaluation.perplexity_tokens

    def step(self, done_frac: float) -> None:
        """Live as far as training is, merge a night that is over; whole segments are read, so that most steps cost
        nothing."""
        if not self.history.before:
            self.history.before = self.life.known()
        self.sleeper.settle()
        self.history.catch_up(self.sleeper.num_over)
        width, life = self.sleeper.model.segment_tokens, self.life
        position = int(done_frac * (life.num_tokens - 1)) // width * width + 1
        while self.sleeper.num_tokens < position:
            day = life.day
            until = min(position, (day + 1) * self.sleeper.config.every_tokens + 1)
            nights = life.read_until(until)
            if nights:
                self.history.add(Day(day, nights), self.sleeper.num_handed_in)
                self.history.catch_up(self.sleeper.num_over)

    def finish(self) -> None:
        """Wait for the nights that are still away."""
        while self.sleeper.settle(wait=True):
            self.history.catch_up(self.sleeper.num_over)

    def document(self) -> dict[str, Any]:
        """Of the life, when it is finished; for the report."""
        return document_of(self.life, self.history, self.sleeper.model, self._corpus, self._tokens)

    def metrics(self) -> dict[str, float]:
        """Of the last day, and of the actors so far; on the first worker also what only it knows."""
        found = dict(self.history.metrics()) if self.history.days else {}
        for actors in (self._nights, self._pool):
            found |= actors.metrics() if actors is not None else {}
        return found | {"sleep/version": float(self.sleeper.version), "sleep/away": float(self.sleeper.num_away)}

    def save(self, folder: Path) -> None:
        """Into a checkpoint, on the first worker."""
        self.sleeper.save(folder)
        self.history.save(folder)

    def load(self, folder: Path) -> None:
        """Go on from `save`. Raises DataError, IncompatibleError."""
        self.sleeper.load(folder)
        self.history.load(folder)
