"""How a memory is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cortex_core.config.settings import Fraction, NonNegative, PositiveInt, Settings


class UpdateConfig(Settings):
    """How gradients become updates."""

    name: Literal["adamw", "apollo", "apollo_mini"] = "adamw"
    """`adamw` keeps two moments of every weight. `apollo` and `apollo_mini` (arXiv:2412.05270) keep them of a random
    projection of each matrix's gradient, and scale the gradient itself by what Adam would do: each channel, or the
    matrix as a whole. What is no matrix, or no longer than `rank` on a side, is updated as by AdamW. Each needs a
    learning rate of its own."""
    rank: PositiveInt | None = None
    """Dimensions of the projection: state grows with it, noise in the scale falls. None is what the paper takes: a
    quarter of a matrix's shorter side for apollo, 1 for apollo_mini."""
    scale: Annotated[float, Field(gt=0.0)] | None = None
    """Times the learning rate, for what is projected. None is what the paper takes: 1 for apollo, and for apollo_mini
    the square root of 128, by which Adam's direction of one row is shorter than that of 128 rows."""
    update_proj_gap: PositiveInt = 200
    """Optimizer steps from one random projection to the next, in which moments start to be of something else. 200 is
    the paper's."""
    lengths: Literal["exact", "projected"] = "exact"
    """How long apollo takes a gradient to be when it scales it: `exact` measures the gradient itself, `projected` its
    projection, as the paper does. At rank 1 the latter is now and then next to nothing, and the step then many times
    too long until the projection is drawn anew."""


class OptimizerConfig(UpdateConfig):
    """The optimizer of the sidecars: one learning rate per kind of parameter, warm-up, then linear decay."""

    learning_rate: Annotated[float, Field(gt=0.0)] = 3e-3
    """Peak rate of the addresses: the map of the layer's input, and its taps."""
    gate_learning_rate: Annotated[float, Field(gt=0.0)] = 1e-2
    """Peak rate of the write gate and its controller."""
    output_learning_rate: Annotated[float, Field(gt=0.0)] = 6e-2
    """Peak rate of the output gate, which starts at exactly 0."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    """Decay rates of the optimizer's moments."""
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
