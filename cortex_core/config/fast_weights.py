"""What a layer's memory is."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cortex_core.config.settings import Fraction, PositiveInt, Settings


class FastWeightsConfig(Settings):
    """The gated delta rule in a learned low-rank key space. Equations: `cortex_core/fast_weights/README.md`."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] | Literal["auto"] = "auto"
    """Decoder layers that carry a memory, counted from 0; `auto` is one layer, a quarter of the way up."""
    rank: PositiveInt = 16
    """Dimensions of the key space per head. A head keeps about `rank` facts apart; state grows linearly with it."""
    rank_budget: Annotated[float, Field(gt=0.0)] | None = None
    """Dimensions per head that are kept, on average over all layers and heads: those that are used least are dropped
    during training (`training.prune_frac`). None keeps all."""
    rule: Literal["delta", "hebbian", "source"] = "delta"
    """How a token is written: `delta` corrects the error at its key; `hebbian` adds, against a decay that is gated by
    the write and an anti-Hebbian term, and moves its own keys; `source` is the published rule, for comparison."""
    chunk_size: Annotated[int, Field(ge=1, le=1024)] = 32
    """Tokens per step of the parallel form: a matter of speed alone."""
    decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.98
    """What one tick leaves of the older state."""
    time_scales: Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], Field(min_length=1)] = (1.0,)
    """Factors of the half-life that `decay` gives, which the heads take in turn: [0.1, 1, 10] is fast, medium, slow."""
    decay_per: Literal["write", "token"] = "write"
    """What counts as a tick: a full write (a token that is not written leaves all), or every token."""
    learn_decay: bool = False
    """Whether each head learns its decay, from the given one."""
    write_strength: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest step of a write. Delta: 1 replaces what a key held; below 2, or errors grow instead of shrinking.
    Hebbian and source: see the bound in the error message; the source has 0.05. 0 never writes."""
    anti_hebbian_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01
    """Share of the state that the Hebbian rules' anti-Hebbian term takes per tick; the delta rule corrects instead."""
    gate: Literal["hard", "soft", "none"] = "hard"
    """The write gate: `hard` has a dead zone, `soft` is a sigmoid that is never quite 0, `none` writes every token."""
    dead_zone: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Gate activations (0 to 1) up to here write exactly nothing, so that a gap of any length costs nothing."""
    saturation: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Gate activations from here on write at full strength."""
    taps: Annotated[int, Field(ge=1, le=16)] = 4
    """Tokens that gates, keys and queries look at: the one in question and those just before it."""
    reversed_frac: Fraction = 0.0
    """Share of the heads that begin by keeping a token under the one after it, not the one before: for facts that are
    also asked for by their end."""
    binding: bool = False
    """Whether an address is also, by a product, that of what stood before: for facts of three words and more,
    where "north of b" and "south of b" are two things. Doubles the parameters of the addresses."""
    shared_values: bool = False
    """Whether every head stores the values of all heads of its layer, and so can give a whole answer alone; state grows
    by the number of heads. For facts with more than one address, among which the heads are split."""
    adapter_rank: Annotated[int, Field(ge=0)] = 0
    """Rank of learned maps of what is stored, from the layer's last few inputs, and of what is read, over all heads. 0
    stores the layer's own values and adds what was read: enough where the answer is a token that was written."""
    slow_slots: Annotated[int, Field(ge=0, le=1_048_576)] = 0
    """Slots of the slow weights, into which sleep moves what the fast weights hold; a layer keeps about as many facts.
    0 has none: `cortex sleep` adds them to sidecars that were trained without."""
    slow_active: Annotated[int, Field(ge=1, le=1024)] = 32
    """Slots that answer an address: more make neighbouring addresses more alike, and distant facts interfere."""
    controller: bool = True
    """Whether surprise, uncertainty, reward and phase modulate the write gate."""
    controller_hidden: PositiveInt = 16
    """Hidden units of the controller."""
    phase_period_tokens: PositiveInt = 512
    """Period of the phase signal sin(2 pi t / period)."""
    uncertainty_threshold: Fraction = 0.9
    """Uncertainty (0 to 1) above which the controller may not write strongly."""
    uncertain_scale: Fraction = 0.5
    """Largest write scale there."""
    controller_test: Literal["none", "mean_gate", "shuffled_surprise"] = "none"
    """For measuring what the controller is worth: its gate held at its mean, or told the surprise of other tokens."""

    @property
    def slowest_rate(self) -> float:
        """Least -ln decay at which the rule is stable for any input (`hebbian_is_contractive`)."""
        return 0.0 if self.rule == "delta" else max(0.0, self.write_strength - self.anti_hebbian_rate)

    @model_validator(mode="after")
    def budget_is_within_rank(self) -> FastWeightsConfig:
        """Dimensions can be dropped, not added."""
        if self.rank_budget is not None and self.rank_budget > self.rank:
            raise ValueError(f"rank_budget = {self.rank_budget} must be at most rank = {self.rank}: it is what is left")
        return self

    @model_validator(mode="after")
    def taps_reach_what_is_bound(self) -> FastWeightsConfig:
        """A reversed head stores the token before; binding looks at what stands two tokens before a value."""
        for name, value, least in (("reversed_frac", self.reversed_frac, 2), ("binding", self.binding, 3)):
            if value and self.taps < least:
                with_it = f"with {name} = {str(value).lower()}: that is how far back it looks"
                raise ValueError(f"taps = {self.taps} must be at least {least} {with_it}")
        return self

    @model_validator(mode="after")
    def adapters_have_values_of_their_own(self) -> FastWeightsConfig:
        """They map the readings of single heads; a sum over heads has none."""
        if self.shared_values and self.adapter_rank:
            raise ValueError(
                f"adapter_rank = {self.adapter_rank} must be 0 with shared_values = true: heads that store all values "
                "need no map between them. Choose one of the two"
            )
        return self

    @model_validator(mode="after")
    def slow_weights_are_sparse(self) -> FastWeightsConfig:
        """One slot more than those that answer says how near is near."""
        if self.slow_slots and self.slow_active >= self.slow_slots:
            raise ValueError(
                f"slow_active = {self.slow_active} must be less than slow_slots = {self.slow_slots}: or every slot "
                "answers every address, and facts cannot be told apart"
            )
        return self

    @model_validator(mode="after")
    def slow_weights_share_the_keys(self) -> FastWeightsConfig:
        """The other rules' reads and writes have addresses that move, or another width."""
        if self.slow_slots and self.rule != "delta":
            raise ValueError(
                f'slow_slots = {self.slow_slots} needs rule = "delta", not {self.rule!r}: only there a fact has one '
                "address for good"
            )
        return self

    @model_validator(mode="after")
    def controller_test_needs_a_controller(self) -> FastWeightsConfig:
        """Without one there is nothing to hold at its mean or to mislead."""
        if self.controller_test != "none" and not self.controller:
            raise ValueError(
                f'controller_test = "{self.controller_test}" needs a controller: set controller to true, or '
                'controller_test to "none"'
            )
        return self

    @model_validator(mode="after")
    def hebbian_is_contractive(self) -> FastWeightsConfig:
        """Along a unit key a write w multiplies the state by decay**w (1 + w (write_strength - anti_hebbian_rate))."""
        rate = -math.log(self.decay) / max(self.time_scales)
        if self.rule != "delta" and rate < self.slowest_rate:
            raise ValueError(
                f"write_strength = {self.write_strength} is beyond the stability bound of rule = {self.rule!r}: must "
                f"be at most anti_hebbian_rate - ln(decay) / max(time_scales) = {self.anti_hebbian_rate + rate:.4f}, "
                "or the state grows with every write. Lower write_strength or decay"
            )
        return self

    @model_validator(mode="after")
    def keys_are_contractive(self) -> FastWeightsConfig:
        """Along a unit key the error is multiplied by 1 - write_strength; it must not grow."""
        if self.rule == "delta" and self.write_strength >= 2.0:
            raise ValueError(
                f"write_strength = {self.write_strength} is beyond the stability bound: along a unit key the error is "
                "multiplied by 1 - write_strength each time. Choose a value below 2 (1 replaces what the key held)"
            )
        return self

    @model_validator(mode="after")
    def learned_decay_starts_below_1(self) -> FastWeightsConfig:
        """A decay of 1 is an infinite half-life, from which no gradient leads away."""
        if self.learn_decay and self.decay == 1.0:
            raise ValueError(
                "decay = 1.0 cannot be learned from: it never forgets. Start below 1, or learn_decay=false"
            )
        return self

    @model_validator(mode="after")
    def gate_can_open(self) -> FastWeightsConfig:
        """Between dead zone and saturation the gate rises from 0 to 1."""
        if self.saturation <= self.dead_zone:
            raise ValueError(
                f"saturation = {self.saturation} must lie above dead_zone = {self.dead_zone}, or the gate is a step "
                "that cannot be trained"
            )
        return self
