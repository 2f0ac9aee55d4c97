"""`cortex dream`: what a model that has slept dreams of what it read, judged, as a table and a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from cortex_core.backbone.load import load_tokenizer
from cortex_core.dreaming import provenance
from cortex_core.dreaming.dream import Dream
from cortex_core.dreaming.graph import MemoryGraph
from cortex_core.dreaming.judge import judge
from cortex_core.dreaming.ngrams import NgramSet
from cortex_core.dreaming.quality import measure
from cortex_core.errors import ConfigError
from cortex_core.tasks.corpus import Corpus, load_corpus
from cortex_core.tasks.fact_book import FactBook
from cortex_core.tasks.filler import TextFiller
from cortex_core.tasks.vocabulary import TaskVocabulary
from cortex_core.training.dreams import MEMORIES
from pipelines import cluster
from pipelines.actor_config import PoolConfig
from pipelines.beside import open_pool
from pipelines.config import SIDECARS_FOLDER, RunConfig, located
from pipelines.dream_report import PICTURE, SUMMARY, draw, print_summary
from pipelines.dreaming import source
from pipelines.progress import line_printer
from pipelines.runs import locked

FOLDER, DREAMS = "dreams", "dreams.jsonl"
TIMEOUT_S = 1800.0


def run(config: RunConfig, folder: Path, number: int) -> int:
    """Dream `number` dreams of what the run in `folder` has read, judge them, report. Returns the exit code."""
    config, console, out = located(config), Console(), folder / FOLDER
    say = line_printer(console, config.name)
    graph = MemoryGraph.load(folder / MEMORIES)
    if not len(graph):
        raise ConfigError(f"{folder / MEMORIES}: nothing was written, so there is nothing to dream of")
    tokenizer = load_tokenizer(config.backbone)
    corpus, vocabulary = load_corpus(config.data, tokenizer), TaskVocabulary.from_tokenizer(tokenizer)
    with locked(out):
        dreams: list[Dream] = []
        for part in dreamed(config, folder.absolute(), number):
            dreams += part
            say(f"{len(dreams)} of {number} dreams")
        known = NgramSet.empty(config.judge.ngram_tokens, config.judge.set_bits).with_rows([corpus.train])
        verdicts, _ = judge(dreams, graph.record, config.judge, corpus=known)
        rows = [
            provenance.row(*pair, lambda ids: str(tokenizer.decode([*ids])))
            for pair in zip(dreams, verdicts, strict=True)
        ]
        quality = measure(verdicts, labels(config, vocabulary, corpus, dreams))
        document = {"dreams": len(dreams), "memories": len(graph), "quality": quality.row()}
        (out / DREAMS).unlink(missing_ok=True)
        provenance.append(out / DREAMS, rows)
        (out / SUMMARY).write_text(json.dumps(document, indent=2) + "\n")
        (out / PICTURE).write_bytes(draw(graph, dreams[0].walk))
    print_summary(document, rows, console)
    for what, name in {"Dreams": DREAMS, "Numbers": SUMMARY, "Picture": PICTURE}.items():
        console.print(f"{what:9} {out / name}", soft_wrap=True, highlight=False)
    return 0


def dreamed(config: RunConfig, folder: Path, number: int) -> Iterator[list[Dream]]:
    """Dreams in order of their tickets, some at a time: by actors, as many as workers, or in this process without any.

    It does not matter by how many: a ticket's dream is the same.
    """
    at_once = config.scenario.batch_size
    make = source(config.model_copy(update={"sidecars": str(folder / SIDECARS_FOLDER)}), folder / MEMORIES)
    parts = [min(at_once, number - first) for first in range(0, number, at_once)]
    workers = config.cluster.num_workers
    with cluster.connect(config.cluster):
        if not workers:
            alone, first = make(), 0
            for size in parts:
                yield [*alone.generate([*range(first, first + size)])]
                first += size
            return
        settings = PoolConfig(
            num_generators=workers, queue_items=2 * at_once, max_staleness=0,
            tickets_per_call=max(1, at_once // workers), num_cpus=config.cluster.cpus_per_worker,
            num_gpus=float(config.cluster.use_gpu),
        )  # fmt: skip
        with open_pool(make, settings) as pool:
            pool.publish(0, ({}, None))
            for size in parts:
                yield [sample.value for sample in pool.take(size, TIMEOUT_S)]


def labels(config: RunConfig, vocabulary: TaskVocabulary, corpus: Corpus, dreams: Sequence[Dream]) -> list[bool]:
    """Whether each answer is that of the book of facts, which the judge has not seen."""
    life = config.life
    book = FactBook(vocabulary, TextFiller(corpus, "held_out"), life.num_facts, life.seed)
    truth: dict[tuple[int, ...], tuple[int, ...]] = {(*book.question(fact),): (fact.value,) for fact in book.facts}
    return [truth.get(dream.question) == dream.answer.tokens for dream in dreams]


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["dream", *sys.argv[1:]]))
