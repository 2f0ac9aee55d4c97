"""Every knob of backbone pretraining, from which the small language model that ships is made."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from cortex_core.config import DataConfig, Fraction, NonNegative, PositiveInt, Settings, TaskName, UpdateConfig


class DecoderConfig(Settings):
    """The shape of the decoder."""

    vocab_size: Annotated[int, Field(ge=300)] = 2560
    """Tokens in the vocabulary: 256 bytes, 3 special tokens, and learned pieces."""
    hidden_size: PositiveInt = 128
    """Width of the residual stream."""
    num_layers: PositiveInt = 6
    """Decoder layers."""
    num_heads: PositiveInt = 4
    """Attention heads; they divide hidden_size."""
    mlp_size: PositiveInt = 256
    """Hidden units of each gated MLP."""
    window_tokens: Annotated[int, Field(ge=128)] = 256
    """Positions the model is trained on, and the length of every training row."""
    rope_theta: Annotated[float, Field(gt=1.0)] = 1e6
    """Base of the rotary positions. The higher, the more dimensions compare content wherever it stands."""
    tied_embeddings: bool = True
    """Whether the output map is the embedding: fewer parameters, and copying carries over to rare words."""

    @model_validator(mode="after")
    def heads_divide_width(self) -> DecoderConfig:
        """Every head has the same even width (rotary positions turn pairs of dimensions)."""
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size = {self.hidden_size} must be a multiple of 2 * num_heads = {2 * self.num_heads}"
            )
        return self


class RowsConfig(Settings):
    """What a training row is, by share; the remaining rows are plain text."""

    key_value_frac: Fraction = 0.15
    """Facts and questions about them."""
    repeat_frac: Fraction = 0.04
    """A short run of tokens again and again: teaches to look for what followed the last time."""
    tasks_frac: Fraction = 0.40
    """All of `tasks` together."""
    tasks: Annotated[tuple[TaskName, ...], Field(min_length=1)] = (
        "long_addition", "long_addition", "copy_reverse", "n_back", "forgetting", "multi_query_recall",
        "needle_multi_value", "variable_tracking", "world_qa1", "world_qa2", "world_qa3", "world_qa4", "world_qa5",
    )  # fmt: skip
    """Further tasks, equally likely; one that is named twice is twice as likely."""
    smaller_frac: Fraction = 0.5
    """Share of the rows of tasks on numbers whose numbers are shorter than the task's own."""
    most_queries: PositiveInt = 8
    """Most questions in a row of `tasks`, as far as the window has room; their number is drawn from 1 to this."""
    no_facts_frac: Fraction = 0.10
    """Share of the key-value rows whose facts are left out; their answers carry no loss."""
    any_token_frac: Fraction = 0.75
    """Share of the task rows whose words are any tokens but held-out words; the others take training words.
    With the few training words alone, a model learns to recall those and no others."""
    early_steps: Annotated[int, Field(ge=0)] = 50
    """Steps at the start that are almost all key-value rows full of questions, until recall is learned."""
    many_queries: PositiveInt = 34
    """Most questions in a key-value row after the early steps; their number is drawn from 1 to this."""
    max_pairs: Annotated[int, Field(ge=6)] = 12
    """Most facts in a key-value row; two thirds of the rows have 6, the others 2 to this."""

    @model_validator(mode="after")
    def shares_leave_text(self) -> RowsConfig:
        """Shares add up to at most 1."""
        total = self.task_frac
        if total > 1.0:
            raise ValueError(f"the shares of task rows add up to {total:.3f}: lower them to at most 1 together")
        return self

    @property
    def task_frac(self) -> float:
        """Share of rows that are not plain text."""
        return self.key_value_frac + self.repeat_frac + self.tasks_frac


class PretrainConfig(Settings):
    """One run of backbone pretraining, in one process."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")] = "stdlib-1m"
    """Name on the model card."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the weights and of every row."""
    steps: PositiveInt = 2800
    """Optimizer steps."""
    batch_size: PositiveInt = 16
    """Rows per step."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-3
    """Peak rate."""
    final_frac: Fraction = 0.02
    """Rate at the last step, as a share of the peak."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Steps until the peak rate."""
    decay_frac: Fraction = 0.3
    """Share of the run, at its end, over which the rate falls linearly."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    """Decay rates of the optimizer's moments."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay."""
    clip_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Largest global gradient norm."""
    answer_weight: NonNegative = 1.0
    """Weight of the mean loss on answers beside the mean loss on text."""
    early_text_weight: NonNegative = 0.1
    """Weight of the text loss in the early steps; 1 after them."""
    repeat_weight: NonNegative = 0.25
    """Weight of a repeated token, of which a row has many, among the answers."""
    random_weight: NonNegative = 0.02
    """Weight of a random filler token, which nothing can predict, among the text."""
    threads: PositiveInt = 1
    """torch threads. The same number of them gives the same weights, bit for bit."""
    score_examples: Annotated[int, Field(ge=2)] = 1000
    """Held-out examples per task and filler in the final scores."""
    checkpoint_every_steps: PositiveInt = 500
    """Steps between checkpoints."""
    report_every_steps: PositiveInt = 25
    """Steps between reports."""
    optimizer: UpdateConfig = UpdateConfig()
    """How gradients become updates."""
    decoder: DecoderConfig = DecoderConfig()
    """The shape of the decoder."""
    rows: RowsConfig = RowsConfig()
    """What a training row is."""
    data: DataConfig = DataConfig()
    """Real text."""
