"""Which dreams may be learned from, and by name why the others may not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from cortex_core.config import JudgeConfig
from cortex_core.dreaming.dream import Dream
from cortex_core.dreaming.memories import Tokens
from cortex_core.dreaming.ngrams import NgramSet, ngrams
from cortex_core.errors import ConfigError


class Reason(StrEnum):
    """Why a dream is rejected."""

    WRONG_ANSWER = "wrong_answer"
    """Not what was written."""
    UNSURE = "unsure"
    """Not verifiable, and another answer was nearly as likely."""
    TOO_SURE = "too_sure"
    """Not verifiable, and nothing left to learn."""
    REPETITIVE = "repetitive"
    """The filler surprises the model too little."""
    NOISE = "noise"
    """The filler surprises the model too much."""
    COPIED = "copied"
    """The filler stands in the corpus."""
    DREAMED_BEFORE = "dreamed_before"
    """Like earlier dreams."""
    TOO_ALIKE = "too_alike"
    """Like another of its batch, which is kept."""


class Scores(NamedTuple):
    """What the judge looks at; the bounds are in `JudgeConfig`. None: there was nothing to measure."""

    answer_nats: float
    """Log-probability of the answer, all its tokens together."""
    margin_nats: float
    """Least log-probability of an answer's token over the next likeliest."""
    filler_nats: float | None
    """Surprise of the filler, mean per token."""
    corpus_novelty: float | None
    """Share of the filler's n-grams that are not in the corpus."""
    dream_novelty: float
    """Share of the dream's n-grams that are in no earlier dream."""
    overlap: float
    """Largest Jaccard overlap with one of its batch that was kept before it."""


class Verdict(NamedTuple):
    """What became of a dream."""

    dream_id: str
    verified: bool
    """Whether it is on record what should be answered. Otherwise the model's margin had to do."""
    reasons: tuple[Reason, ...]
    """All that speak against it; none for a dream that passes."""
    scores: Scores

    @property
    def passed(self) -> bool:
        """Whether it may be learned from."""
        return not self.reasons


def judge(
    dreams: Sequence[Dream],
    record: Mapping[Tokens, Tokens],
    config: JudgeConfig,
    *,
    earlier: NgramSet | None = None,
    corpus: NgramSet | None = None,
) -> tuple[list[Verdict], NgramSet]:
    """Verdicts in the order of the dreams, and `earlier` with those that pass.

    `record` says what is to be answered to which question; a question that is not on it, or with an empty answer, is
    not verifiable. Dreams are judged by ticket: the result does not depend on the order in which they come. Raises
    ConfigError for a set of n-grams of another length than the settings'.
    """
    earlier = NgramSet.empty(config.ngram_tokens, config.set_bits) if earlier is None else earlier
    for name, known in (("earlier", earlier), ("corpus", corpus)):
        if known is not None and known.count != config.ngram_tokens:
            raise ConfigError(
                f"{name} holds n-grams of {known.count} tokens, ngram_tokens = {config.ngram_tokens}: build it anew"
            )
    kept = _Kept(config.ngram_tokens)
    verdicts: dict[int, Verdict] = {}
    for at in sorted(range(len(dreams)), key=lambda at: (dreams[at].ticket, dreams[at].id)):
        dream = dreams[at]
        scores = _scores(dream, earlier, corpus, kept)
        written = record.get(dream.question, ())
        reasons = (*_about_answer(dream, written, scores, config), *_about_text(dream, scores, config))
        verdicts[at] = Verdict(dream.id, bool(written), reasons, scores)
        if not reasons:
            kept.add(dream.prompt)
    passed = [dreams[at].prompt for at in sorted(verdicts) if verdicts[at].passed]
    return [verdicts[at] for at in range(len(dreams))], earlier.with_rows(passed)


def _scores(dream: Dream, earlier: NgramSet, corpus: NgramSet | None, kept: _Kept) -> Scores:
    filler = dream.filler
    return Scores(
        answer_nats=sum(dream.answer.nats),
        margin_nats=min(dream.answer.margins, default=0.0),
        filler_nats=-sum(filler.nats) / len(filler.nats) if filler.nats else None,
        corpus_novelty=corpus.novelty(filler.tokens) if corpus is not None and filler.tokens else None,
        dream_novelty=earlier.novelty(dream.prompt),
        overlap=kept.overlap(dream.prompt),
    )


def _about_answer(dream: Dream, written: Tokens, scores: Scores, config: JudgeConfig) -> Iterator[Reason]:
    if written:
        if dream.answer.tokens != written:
            yield Reason.WRONG_ANSWER
    elif scores.margin_nats < config.min_margin_nats:
        yield Reason.UNSURE
    elif scores.margin_nats > config.max_margin_nats:
        yield Reason.TOO_SURE


def _about_text(dream: Dream, scores: Scores, config: JudgeConfig) -> Iterator[Reason]:
    long_enough = len(dream.filler.tokens) >= config.band_tokens
    if long_enough and scores.filler_nats is not None:
        if scores.filler_nats < config.min_filler_nats:
            yield Reason.REPETITIVE
        elif not scores.filler_nats <= config.max_filler_nats:  # also what is not a number
            yield Reason.NOISE
    if long_enough and scores.corpus_novelty is not None and scores.corpus_novelty < config.min_corpus_novelty:
        yield Reason.COPIED
    if scores.dream_novelty < config.min_dream_novelty:
        yield Reason.DREAMED_BEFORE
    if scores.overlap > config.max_overlap:
        yield Reason.TOO_ALIKE


class _Kept:
    """N-grams of the dreams that were kept so far, by n-gram: those that share none are never looked at."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.sizes: list[int] = []
        self.having: dict[int, list[int]] = {}

    def add(self, tokens: Tokens) -> None:
        grams = ngrams(tokens, self.count).tolist()
        for gram in grams:
            self.having.setdefault(gram, []).append(len(self.sizes))
        self.sizes.append(len(grams))

    def overlap(self, tokens: Tokens) -> float:
        grams = ngrams(tokens, self.count).tolist()
        shared = Counter(at for gram in grams for at in self.having.get(gram, ()))
        return max((n / (len(grams) + self.sizes[at] - n) for at, n in shared.items()), default=0.0)
