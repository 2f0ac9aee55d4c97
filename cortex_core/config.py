"""Every knob of the core: one class per component, one default per knob, bounds checked when it is built.

No torch, no ray: `cortex --help` and a wrong value are answered before either is imported. The line under a field is
its documentation: unit, range, effect. Cross-field rules are validators named after the rule.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0.0)]

TaskName = Literal[
    "key_value", "copy_reverse", "n_back", "long_addition", "multi_query_recall", "forgetting", "needle_single",
    "needle_multi_key", "needle_multi_value", "needle_multi_query", "variable_tracking", "world_qa1", "world_qa2",
    "world_qa3", "world_qa4", "world_qa5", "split_addition",
]  # fmt: skip
SourceName = Literal[TaskName, "corpus"]
"""What a mixture is made of: tasks, and plain text."""
FillerName = Literal["text", "random"]

ASSETS = Path(__file__).resolve().parent / "assets"
"""Models that ship with the package, a folder each."""
BUILTIN = "builtin:"
"""What the name of a model that ships begins with."""
CORPUS_SUFFIXES = (".txt", ".jsonl", ".parquet")
"""Files that text is read from."""


class Settings(BaseModel):
    """Frozen, and closed to unknown keys: a typo is an error, not a silent default."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class BackboneConfig(Settings):
    """The frozen language model."""

    name: str = "builtin:stdlib-1m"
    """A Hugging Face hub id, a local folder, or `builtin:<folder>` for a model that ships with the package."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); None takes the default branch."""
    dtype: Literal["auto", "fast", "float32", "bfloat16", "float16"] = "auto"
    """Type of the frozen weights: `auto` takes the checkpoint's, `fast` bfloat16 where the processor multiplies it
    natively and else float32. The memory itself is always float32."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """The attention that the memory wraps."""
    segment_tokens: Annotated[int, Field(ge=8)] = 256
    """Tokens that attention sees at once; memory carries everything before them. At most the model's own window."""


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
    adapter_rank: Annotated[int, Field(ge=0)] = 0
    """Rank of learned maps of what is stored, from the layer's last few inputs, and of what is read, over all heads. 0
    stores the layer's own values and adds what was read: enough where the answer is a token that was written."""
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


class DataConfig(Settings):
    """Real text: filler between facts, in-window training, and the held-out text on which drift is measured."""

    path: str | None = None
    """A .txt, .jsonl or .parquet file, or a folder of them; None takes the Python standard library's own sources."""
    text_column: str = "text"
    """Field or column that holds the text in .jsonl and .parquet."""
    held_out_frac: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of the files (of the records or blocks of lines, when there is one file) that training never sees."""
    max_bytes: Annotated[int, Field(ge=4096)] = 64_000_000
    """Upper bound on the text that is read, in bytes."""


class TasksConfig(Settings):
    """What the memory is trained on and asked about."""

    names: Annotated[tuple[SourceName, ...], Field(min_length=1)] = ("key_value",)
    """Tasks in the training mixture, drawn with equal probability; `corpus` is plain text, every token of which is to
    be predicted from the segments before."""
    fillers: Annotated[tuple[FillerName, ...], Field(min_length=1)] = ("text", "random")
    """What stands in the gap: real text, random tokens, or either."""
    num_pairs: Annotated[int, Field(ge=1, le=64)] = 6
    """Keys per example of key_value, forgetting and multi_query_recall."""
    any_token_frac: Fraction = 0.5
    """Share of training examples whose words are any tokens; never held-out words."""
    num_queries: Annotated[int, Field(ge=1)] = 6
    """Questions per training example; evaluation asks one."""


class OptimizerConfig(Settings):
    """AdamW over the sidecars: one learning rate per kind of parameter, warm-up, then linear decay."""

    learning_rate: Annotated[float, Field(gt=0.0)] = 3e-3
    """Peak rate of the addresses: the map of the layer's input, and its taps."""
    gate_learning_rate: Annotated[float, Field(gt=0.0)] = 1e-2
    """Peak rate of the write gate and its controller."""
    output_learning_rate: Annotated[float, Field(gt=0.0)] = 6e-2
    """Peak rate of the output gate, which starts at exactly 0."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    """Moment decay rates of Adam."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    clip_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Optimizer steps until the peak rate."""
    final_frac: Fraction = 0.05
    """Rate at the last step, as a share of the peak."""


class TrainingConfig(Settings):
    """One run of sidecar training."""

    steps: PositiveInt = 600
    """Optimizer steps."""
    batch_size: PositiveInt = 16
    """Long sequences per optimizer step, over all workers and accumulation steps."""
    accumulation_steps: PositiveInt = 1
    """Micro-batches per optimizer step on each worker."""
    max_segments: Annotated[int, Field(ge=2)] = 9
    """Longest training sequence, in segments."""
    short_frac: Fraction = 0.4
    """Share of training, from its start, spent on two segments of a quarter and then half the window; afterwards
    segments are whole and their number is drawn from 2 to `max_segments`."""
    prune_frac: Fraction = 0.6
    """Share of training after which the memory is cut down to `fast_weights.rank_budget`, if there is one."""
    read_strength: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of its reading with which a memory must answer in training: the rest is a margin for words it never saw."""
    write_noise: Annotated[float, Field(ge=0.0, le=0.1)] = 0.004
    """Share of tokens that training writes whatever the gate says: what was learned must survive writes by mistake."""
    truncate_segments: Annotated[int, Field(ge=0)] = 0
    """Gradients flow back through this many segments of carried state; 0 means all of them."""
    calibration_windows: Annotated[int, Field(ge=0)] = 64
    """Windows on which new addresses are fitted to the backbone before the first step; 0 leaves them random."""
    in_window_batch_size: Annotated[int, Field(ge=0)] = 4
    """In-window sequences per optimizer step, over all workers, held to the bare model by KL; 0 turns them off."""
    kl_weight: NonNegative = 1.0
    """Weight of KL(bare model || model with memory), in nats per token, on the in-window sequences."""
    sparsity_weight: NonNegative = 10.0
    """Weight of the write penalty: how far gates stand above the lower edge of the dead zone's safety margin."""
    sparsity_span: tuple[Fraction, Fraction] = (0.2, 0.4)
    """Shares of training between which the write penalty rises to its weight: what to write has to be found before."""
    sparsity_margin: NonNegative = 0.4
    """Safety margin below the dead zone, in gate activation: unused gates are pushed this far from opening."""
    filler_windows: Annotated[int, Field(ge=0)] = 2
    """Windows of filler per long sequence on which gates that come near opening are pushed shut; 0 turns them off."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.98
    """Decay per step of the weight average that is evaluated and exported; 0 turns averaging off."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Mixed precision of the forward pass; state and losses stay in float32."""
    gradient_checkpointing: bool = False
    """Recompute the backbone's activations in the backward pass: slower, less memory."""
    max_nonfinite_steps: Annotated[int, Field(ge=0)] = 10
    """Steps with a non-finite loss or gradient that are skipped before the run stops with an error."""
    checkpoint_every_steps: PositiveInt = 50
    """Steps between checkpoints."""
    report_every_steps: PositiveInt = 10
    """Steps between reports to the driver, to MLflow and to the progress bar."""

    @model_validator(mode="after")
    def penalty_rises(self) -> TrainingConfig:
        """The write penalty is 0 before it is whole."""
        begin, end = self.sparsity_span
        if begin > end:
            raise ValueError(f"sparsity_span = [{begin}, {end}] must begin before it ends")
        return self


class EvaluationConfig(Settings):
    """What is asked of a trained model, with memory on and off on the same examples."""

    tasks: Annotated[tuple[TaskName, ...], Field(min_length=1)] = ("key_value",)
    """Tasks that are scored."""
    fillers: Annotated[tuple[FillerName, ...], Field(min_length=1)] = ("text", "random")
    """Fillers that are scored, each on its own."""
    gaps_tokens: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (
        0, 256, 512, 1024, 2048, 4096, 8192, 16384,
    )  # fmt: skip
    """Filler tokens between the facts and the question; 0 asks within the window."""
    num_examples: Annotated[int, Field(ge=2)] = 200
    """Independent examples per task, filler and gap."""
    batch_size: PositiveInt = 50
    """Examples read side by side on each worker: more is faster and takes more memory, whatever the gap."""
    perplexity_tokens: Annotated[int, Field(ge=0)] = 65_536
    """Tokens of held-out text for the drift measurement; 0 skips it."""
