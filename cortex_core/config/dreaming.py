"""What dreams are made of: the graph of memories, the scenarios drawn from it, and the judge of what comes out."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from cortex_core.config.settings import Fraction, NonNegative, PositiveInt, Settings


class MemoryGraphConfig(Settings):
    """Which memories are linked, how strongly, and how far a walk over them goes."""

    max_memories: PositiveInt = 4096
    """Memories that are kept at most; the least important go first."""
    neighbours: PositiveInt = 8
    """Memories that each one is linked to at most, for each kind of link, counted from its own end: a memory that is
    near to many has more. Cost grows linearly."""
    similarity_weight: NonNegative = 1.0
    """Weight of the cosine of two addresses, where it is above 0."""
    time_weight: NonNegative = 0.5
    """Weight of nearness in the stream, exp(-distance / time_tokens)."""
    time_tokens: Annotated[float, Field(gt=0.0)] = 128.0
    """Tokens of distance over which nearness in the stream falls to 1/e."""
    together_weight: NonNegative = 0.25
    """Weight of having been read in the same segment."""
    walk_steps: PositiveInt = 12
    """Steps of a walk. More steps reach memories that are further apart."""
    restart: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Probability that a step goes back to where the walk began. Higher stays nearer."""
    max_pairs: PositiveInt = 65_536
    """Pairs of memories of which it is remembered how often they met in a dream; the earliest go first."""

    @model_validator(mode="after")
    def something_links(self) -> MemoryGraphConfig:
        """Without any kind of link there is nothing to walk on."""
        if not self.similarity_weight + self.time_weight + self.together_weight:
            raise ValueError(
                "similarity_weight, time_weight and together_weight are all 0: no memory is linked to another. Give at "
                "least one of them a weight above 0"
            )
        return self


class ScenarioConfig(Settings):
    """What stands before the question of a dream."""

    max_lines: Annotated[int, Field(ge=0)] = 3
    """Lines of other memories at most; how many is drawn evenly from 0 to this."""
    max_filler_tokens: Annotated[int, Field(ge=0)] = 48
    """Tokens of decoded filler at most; how many is drawn evenly from 0 to this. Questions that are always asked at the
    same place are answered worse at any other."""
    context_tokens: PositiveInt = 16
    """Tokens of a memory's context from which the filler is decoded; they are no part of the dream."""
    own_line_frac: Fraction = 0.0
    """Share of the dreams in which the line of the memory that is asked for may be read in the scenario. At 0, every
    answer has to come from the weights."""
    temperature: Annotated[float, Field(gt=0.0)] = 0.9
    """Temperature at which filler is sampled. Low repeats itself, high is noise."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.98
    """Least total probability of the likeliest tokens from which filler is sampled; 1 samples from all."""
    answer_tokens: PositiveInt = 1
    """Tokens that are decoded where it is not known how long the answer was; else as many as were written."""
    batch_size: PositiveInt = 64
    """Dreams that are decoded side by side: a matter of memory and speed alone."""


class JudgeConfig(Settings):
    """What a dream must be like to be learned from."""

    min_filler_nats: NonNegative = 1.5
    """Surprise of the filler, mean per token, below which it is rejected: it repeats itself."""
    max_filler_nats: Annotated[float, Field(gt=0.0)] = 6.0
    """Surprise of the filler, mean per token, above which it is rejected: it is noise."""
    band_tokens: PositiveInt = 8
    """Tokens of filler from which on these two bounds apply: a mean over fewer says little."""
    ngram_tokens: PositiveInt = 4
    """Tokens of the n-grams by which dreams are compared."""
    min_corpus_novelty: Fraction = 0.25
    """Share of the filler's n-grams that must not stand in the corpus; lower is copied text."""
    min_dream_novelty: Fraction = 0.25
    """Share of a dream's n-grams that must not stand in an earlier dream."""
    max_overlap: Fraction = 0.5
    """Largest Jaccard overlap of n-grams with a dream of the same batch that was kept."""
    set_bits: Annotated[int, Field(ge=10, le=36)] = 24
    """Size of a set of n-grams: 2^this bits. At a share s of bits set, a new n-gram passes for a known one with
    probability s."""
    min_margin_nats: NonNegative = 2.0
    """For answers that cannot be verified: log-probability of the answer over the next likeliest, from which on it
    counts as an answer."""
    max_margin_nats: Annotated[float, Field(gt=0.0)] = 20.0
    """For answers that cannot be verified: margin above which there is nothing left to learn."""

    @model_validator(mode="after")
    def bands_are_not_empty(self) -> JudgeConfig:
        """Something lies between the lower and the upper bound."""
        for name in ("filler_nats", "margin_nats"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low >= high:
                raise ValueError(f"min_{name} = {low} must be below max_{name} = {high}, or every dream is rejected")
        return self


class DreamConfig(Settings):
    """Dreams: from memories to what may be learned from them."""

    graph: MemoryGraphConfig = MemoryGraphConfig()
    """Links and walks."""
    scenario: ScenarioConfig = ScenarioConfig()
    """What stands before the question."""
    judge: JudgeConfig = JudgeConfig()
    """What is kept."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of all draws. The same ticket, seed, memories and model give the same dream."""
