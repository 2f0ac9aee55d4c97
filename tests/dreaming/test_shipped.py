"""From reading to verdicts, with the memory that ships: what it has written it answers in dreams, and nothing else passes."""

from __future__ import annotations

from pathlib import Path

import torch

from cortex_core.backbone.load import load_tokenizer
from cortex_core.backbone.model import Cortex
from cortex_core.config import BackboneConfig, DataConfig, DreamConfig, ScenarioConfig
from cortex_core.dreaming.dream import Dreamer
from cortex_core.dreaming.graph import MemoryGraph
from cortex_core.dreaming.judge import judge
from cortex_core.dreaming.memories import written
from cortex_core.dreaming.ngrams import NgramSet
from cortex_core.dreaming.provenance import append, read, row
from cortex_core.dreaming.quality import measure
from cortex_core.tasks.corpus import load_corpus
from cortex_core.tasks.fact_book import FactBook
from cortex_core.tasks.filler import TextFiller
from cortex_core.tasks.vocabulary import TaskVocabulary

BACKBONE, SIDECARS = "builtin:stdlib-1m", "builtin:stdlib-1m/sidecars"
CONFIG = DreamConfig(scenario=ScenarioConfig(max_filler_tokens=16, max_lines=2))


def test_what_was_read_by_day_is_dreamed_and_verified(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(BackboneConfig(name=BACKBONE))
    vocabulary, corpus = TaskVocabulary.from_tokenizer(tokenizer), load_corpus(DataConfig(max_bytes=300_000), tokenizer)
    book = FactBook(vocabulary, TextFiller(corpus, "held_out"), num_facts=8, seed=4)
    tokens = [*book.day(0, range(8), 512), *book.day(1, range(0), 300)]
    model = Cortex.from_pretrained(BACKBONE, sidecars=SIDECARS)
    session = model.new_session(log_writes=64)
    model.read(torch.tensor([tokens]), session)

    graph = MemoryGraph.of(written(session, tokens, 0, vocabulary.pieces[" recall"]))
    truth = {tuple(book.question(fact)): fact.value for fact in book.facts}
    assert truth.keys() <= graph.record.keys() and len(graph) <= 12
    dreams = Dreamer(model, graph, CONFIG, model_version="read", session=session).dream(range(60))
    assert len({dream.asked for dream in dreams}) > len(graph) / 2

    known = NgramSet.empty(CONFIG.judge.ngram_tokens, CONFIG.judge.set_bits).with_rows([tokens])
    verdicts, _ = judge(dreams, graph.record, CONFIG.judge, corpus=known)
    found = measure(verdicts, [truth.get(dream.question) == dream.answer.tokens[0] for dream in dreams])
    assert found.precision.value == 1.0 and found.kept.value is not None and found.kept.value > 0.5

    append(tmp_path / "dreams.jsonl", [row(d, v, tokenizer.decode) for d, v in zip(dreams, verdicts, strict=True)])
    assert all(" recall" in line["prompt_text"] for line in read(tmp_path / "dreams.jsonl"))
