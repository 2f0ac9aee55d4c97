"""What sleep is made of: segments, their codes, the replay buffer, the anchor and the scaling of slow weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cortex_core.config.night import NightConfig
from cortex_core.config.settings import Fraction, NonNegative, PositiveInt, Settings


class SegmentsConfig(Settings):
    """When reading is surprising enough to be kept: hysteresis on surprise over its own running average."""

    open_ratio: Annotated[float, Field(gt=1.0)] = 1.2
    """Surprise over its average, above which a segment opens. Higher keeps less."""
    close_ratio: Annotated[float, Field(gt=0.0)] = 1.05
    """Surprise over its average, below which the open segment closes. Nearer to 1 makes segments longer."""
    average_decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.98
    """What one token leaves of the average: 0.98 looks back about 50 tokens. An average as quick as the surprise
    itself closes a segment by catching up with it."""
    warmup_tokens: PositiveInt = 32
    """First tokens of a stream, which only feed the average: none of them opens a segment."""
    min_tokens: PositiveInt = 4
    """Tokens that a segment has at least: it stays open so long, whatever the surprise."""
    max_tokens: PositiveInt = 256
    """Tokens that a segment has at most; what is still surprising then opens the next one."""

    @model_validator(mode="after")
    def opening_is_above_closing(self) -> SegmentsConfig:
        """Between the two a segment stays what it is; without a gap every token near the threshold is a border."""
        if self.close_ratio >= self.open_ratio:
            raise ValueError(
                f"close_ratio = {self.close_ratio} must be below open_ratio = {self.open_ratio}, or segments flicker "
                "at the threshold. Lower close_ratio"
            )
        return self

    @model_validator(mode="after")
    def segments_may_end(self) -> SegmentsConfig:
        """The shortest segment is not longer than the longest."""
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens = {self.min_tokens} must be at most max_tokens = {self.max_tokens}")
        return self


class CodesConfig(Settings):
    """The encoder of a segment's statistics into a few numbers, and its decoder."""

    num_streams: Annotated[int, Field(ge=1)] = 8
    """Streams of text, with facts in it, whose segments are fitted."""
    held_out_streams: Annotated[int, Field(ge=1)] = 2
    """Further streams, of held-out text, whose segments say how much of them a code keeps."""
    stream_tokens: PositiveInt = 4096
    """Tokens of a stream, rounded up to whole segments of the backbone."""
    code_size: PositiveInt = 128
    """Numbers in a code."""
    hidden_size: PositiveInt = 256
    """Hidden units of encoder and decoder, one layer each, beside a linear map."""
    num_directions: PositiveInt = 2
    """Singular directions of each head's change that are encoded, the largest first. Cost grows linearly; what lies
    in the others is lost."""
    steps: PositiveInt = 500
    """Optimizer steps of one fit."""
    batch_size: PositiveInt = 64
    """Segments per step."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 3e-4
    """Peak rate of AdamW; it falls to 0 over the fit as a half cosine."""
    weight_decay: NonNegative = 1e-4
    """Decoupled weight decay."""
    validation_frac: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the segments of a fit that only say when it was best: that is what it ends with."""


class ReplayConfig(Settings):
    """What is kept for sleep, and what of it is replayed."""

    capacity_items: PositiveInt = 8192
    """Items that are kept at most."""
    capacity_bytes: PositiveInt = 268_435_456
    """Bytes of their tensors and notes that are kept at most. One item that is larger is refused."""
    decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """What one sleep leaves of an item's importance, when it comes to what has to go. 1 forgets by importance alone."""
    surprise_power: NonNegative = 1.0
    """How much draws prefer surprising items: their weight is surprise to this power. 0 draws evenly."""
    draw_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.98
    """What one sleep leaves of an item's weight in draws: below 1 prefers new items, 1 ignores age. 0.98 halves it in
    34 nights; with 0.8 what is 20 nights old is hardly ever replayed."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the draws. The same items, seed and number of draws so far give the same draw."""


class FisherConfig(Settings):
    """How slow weights are held to where they were: a quadratic penalty, by the diagonal of the Fisher matrix."""

    weight: NonNegative = 0.0
    """Factor of the penalty. 0 turns it off, and nothing is measured."""
    epoch_nights: PositiveInt = 8
    """Nights of a consolidation epoch: after so many, what they have learned is held as well, and the anchor moves."""
    decay: Fraction = 0.9
    """What one consolidation epoch leaves of the estimate before it. 1 sums all epochs, 0 knows the last one alone."""
    damping: NonNegative = 0.0
    """Added to every entry of the diagonal, in units of the Fisher matrix: holds what no example was sensitive to."""
    labels: Literal["given", "sampled"] = "given"
    """Whose answers the gradients are of: `given` are the examples' own (empirical Fisher: also counts how wrong the
    model is), `sampled` are drawn from the model (true Fisher: the curvature of its KL divergence)."""
    per_example: Literal["vmap", "loop"] = "vmap"
    """How each example gets a gradient of its own: all of a chunk at once, or one after the other, for models that
    vmap does not take. The result is the same."""
    chunk_examples: PositiveInt = 16
    """Examples at once. Memory is this many gradients."""


class ScalingConfig(Settings):
    """Synaptic scaling: each unit's weights are multiplied towards a norm."""

    rate: Fraction = 0.0
    """Share of the way, in the logarithm of the norm, that one application goes. 0 is off, 1 sets the norm."""
    target_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Norm of a unit's weights that is aimed at, where the caller gives none per unit."""
    max_factor: Annotated[float, Field(gt=1.0)] = 2.0
    """Largest factor by which one application changes a norm, up or down."""


class SleepConfig(NightConfig):
    """When a model sleeps, and how it learns meanwhile."""

    place: Literal["slow_weights", "backbone"] = "slow_weights"
    """Where nights put what they learn: into slow weights of the memory, or into low-rank changes of the backbone that
    lie in a file of their own and can be taken off again (`unfreeze`)."""
    every_tokens: PositiveInt = 512
    """Tokens read between two sleeps, rounded up to whole segments of the backbone: a day."""
    questions: Annotated[tuple[str, ...], Field(min_length=1)] = (" recall", "\n recall", " the recall")
    """What stands before a cue in the questions that the model asks itself: one question per text and cue. Of a single
    text it learns an answer that holds in that place alone: give the ways in which it will be asked."""
    cue_tokens: PositiveInt = 1
    """Tokens before a written one that are its cue: as many as tell what it belongs to."""
    lead_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of the day's text at most that stand before such a question, how many is drawn; 0 asks at the beginning of
    a text. More makes what is learned a little surer far into a text, and a night several times as long."""
    min_write: Fraction = 0.05
    """Strength of a write, mean over heads, from which on it gives a question."""
    min_gain_nats: NonNegative = 0.1
    """KL between the answers with and without fast weights, from which on there is something to learn."""
    max_lessons: PositiveInt = 256
    """Questions of one night at most: those from whose answers there is most to learn."""
    steps: PositiveInt = 8
    """Optimizer steps per night."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 0.1
    """How far the slot that matters most moves in a step, root mean square over its entries."""
    replayed: Annotated[int, Field(ge=0)] = 64
    """Lessons of earlier nights that are drawn anew for every step; 0 replays nothing."""
    dream_frac: Fraction = 0.0
    """Share of these that are dreamed instead: made by the model from what was written, judged, and learned if they
    pass. 1 keeps no lesson of an earlier night."""
    dreams_per_night: PositiveInt = 128
    """Dreams that a night has at most to draw from, if there are any."""
    replay_weight: NonNegative = 1.0
    """Weight of what is replayed, against tonight's lessons."""
    batch_size: PositiveInt = 64
    """Questions that are answered side by side: a matter of memory and speed alone."""
    top_tokens: Annotated[int, Field(ge=1, le=4096)] = 16
    """Likeliest tokens of an answer that are kept one by one; the rest counts as one."""
    slots: Annotated[int, Field(ge=2, le=1_048_576)] = 8192
    """Slots of slow weights that are added to a memory without any."""
    active: Annotated[int, Field(ge=1, le=1024)] = 32
    """Of these, how many answer an address (`fast_weights.slow_active`)."""
    max_drift_nats: NonNegative = 0.01
    """Largest KL(bare model || model with slow weights) on held-out text, mean per token; a night that goes beyond it
    is undone."""
    guard_windows: Annotated[int, Field(ge=0)] = 8
    """Windows of held-out text on which that is measured; 0 does not measure."""
