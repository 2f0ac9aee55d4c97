"""One layer's memory: from the layer's input and its own values to what it adds to the attention output."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from cortex_core.config import FastWeightsConfig
from cortex_core.fast_weights import signals
from cortex_core.fast_weights.adapters import Adapters
from cortex_core.fast_weights.address import Addresses
from cortex_core.fast_weights.chunk import scan
from cortex_core.fast_weights.controller import Controller
from cortex_core.fast_weights.decay import Decay
from cortex_core.fast_weights.gate import TappedGate, hard_gate
from cortex_core.fast_weights.replay import Written
from cortex_core.fast_weights.rules import Dose, Rule, step_by_step
from cortex_core.fast_weights.slow import SlowWeights
from cortex_core.fast_weights.state import FastWeights


class LayerTokens(NamedTuple):
    """What one attention layer computed for its tokens, and where they stand. Shapes: `layer_shape`."""

    hidden: Float[Tensor, "batch tokens hidden"]
    values: Float[Tensor, "batch heads tokens value_dim"]
    attended: Float[Tensor, "batch heads tokens value_dim"]
    valid: Bool[Tensor, "batch tokens"]
    """False at padding, which comes last."""
    positions: Int[Tensor, "batch tokens"]
    reward: Float[Tensor, "batch tokens"]
    segment_tokens: int
    """Width of the segments that these tokens are, the last of which may be short."""
    silent: Bool[Tensor, "batch tokens"] | None = None
    """Tokens that must not be written, whatever the gate says; None is no token."""
    forced: Bool[Tensor, "batch tokens"] | None = None
    """Tokens that are written at full strength, whatever the gate says; None is no token."""


class LayerShape(NamedTuple):
    """The sizes of an attention layer that a sidecar must know."""

    hidden: int
    heads: int
    head_dim: int
    value_dim: int


class Reading(NamedTuple):
    """What a sidecar gives back for one pass."""

    added: Float[Tensor, "batch heads tokens value_dim"] | None
    """To be added to the attention output; None when only the state was asked for."""
    final_state: FastWeights
    write: Float[Tensor, "batch heads tokens"]
    """Strength of each token's write."""
    surprise: Float[Tensor, "batch heads tokens"]
    activation: Float[Tensor, "batch heads tokens"]
    """The write gate's activation after the controller, before the dead zone; what the sparsity penalty acts on."""
    written: Written | None = None
    """What was written of each token; None unless it was asked for."""


class Sidecar(nn.Module):
    """The memory of one layer. Parameters float32; adds exactly 0 until `output_gate` is trained."""

    def __init__(self, shape: LayerShape, config: FastWeightsConfig) -> None:
        super().__init__()
        self.shape, self.config = shape, config
        source = config.rule == "source"
        self.addresses = Addresses(shape.hidden, shape.heads, config, shape.head_dim if source else config.rank)
        self.decay = Decay(config, shape.heads)
        # The source's own start, zero, could never be written: whatever is written goes through it.
        self.initial_down = nn.Parameter(_orthogonal(shape, config.rank)) if source else None
        # Just open: a gradient everywhere, and writes too weak to overwrite one another.
        gates = config.gate != "none"
        self.write_gate = (
            TappedGate(shape.hidden, shape.heads, config.taps, bias=_just_open(config, 0.05)) if gates else None
        )
        self.read_gate = TappedGate(shape.hidden, shape.heads, config.taps, bias=_just_open(config, 0.25))
        self.adapters = Adapters(shape.hidden, shape.heads, shape.value_dim, config) if config.adapter_rank else None
        self.output_gate = nn.Parameter(torch.zeros(shape.heads))
        self.controller = Controller(config) if config.controller else None
        self.value_dim = shape.heads * shape.value_dim if config.shared_values else shape.value_dim
        self.slow: SlowWeights | None = None
        if config.slow_slots:
            self.grow_slow_weights(config)

    def empty_state(self, batch: int) -> FastWeights:
        """A memory that holds nothing."""
        s, rank, device = self.shape, self.config.rank, self.output_gate.device
        reverse = self.addresses.num_reversed
        width = s.hidden + (min(reverse, 1) if self.config.shared_values else reverse) * self.value_dim
        context = torch.zeros(batch, self.config.taps - 1, width, device=device)
        empty = FastWeights.zeros(batch, s.heads, rank, self.value_dim, device)._replace(context=context)
        if self.initial_down is not None:
            return empty._replace(down=self.initial_down.expand(batch, -1, -1, -1))
        if self.config.rule == "hebbian":
            return empty._replace(down=torch.zeros(batch, s.heads, rank, rank, device=device))
        return empty

    @property
    def state_bytes(self) -> int:
        """What must be kept of one reader, in bytes: no row for a dimension that was pruned."""
        pruned = int((self.addresses.live == 0).sum()) if self.config.rule == "delta" else 0
        return self.empty_state(1).num_bytes - pruned * self.value_dim * 4

    def grow_slow_weights(self, config: FastWeightsConfig) -> None:
        """Add slow weights of the sizes in `config`, which is otherwise this memory's own; none if there are some."""
        self.config = config
        if self.slow is None:
            sizes = (self.shape.heads, config.rank, self.value_dim)
            self.slow = SlowWeights(*sizes, slots=config.slow_slots, active=config.slow_active)
            self.slow.to(self.output_gate.device)

    def rule(self) -> Rule:
        """The recurrence with the constants that the parameters now give."""
        config, log_decay = self.config, self.decay()
        if config.rule == "delta":
            return Rule(log_decay)
        source = config.rule == "source"
        return Rule(log_decay, hebbian=True, anti_hebbian=config.anti_hebbian_rate, slow=not source, clamp=source)

    def forward(
        self,
        tokens: LayerTokens,
        initial_state: FastWeights,
        *,
        snapshot_segment: Int[Tensor, " batch"] | None = None,
        read: bool = True,
        anchor: FastWeights | None = None,
        log: bool = False,
    ) -> tuple[Reading, FastWeights]:
        """Read `tokens` from `initial_state`. Returns the reading and the state at the start of `snapshot_segment`.

        With an `anchor`, the state at the start of the open segment, token by token (generation); otherwise the first
        token opens a segment. With `log`, the reading says what was written. All of it in float32, also under autocast.
        """
        with torch.autocast(tokens.hidden.device.type, enabled=False):
            return self._read(tokens, initial_state, snapshot_segment, read, anchor, log)

    def activations(self, tokens: LayerTokens, state: FastWeights) -> Float[Tensor, "batch heads tokens"]:
        """The write gate's activations where nothing is written: `Reading.activation` of filler, at a fraction of the
        cost, as the state stays what it is."""
        with torch.autocast(tokens.hidden.device.type, enabled=False):
            hidden, values, _ = self._given(tokens, state)
            gate = _Gate(self, tokens, hidden, values)
            surprise = None
            if gate.needs_surprise:
                keys = self.addresses(hidden, read=False)[0][:, :, -values.shape[2] :]
                surprise = signals.surprise(gate.news(values, keys), self.rule().predict(keys, state))
            gate(surprise, slice(None))
            return gate.modulated

    def _given(self, tokens: LayerTokens, state: FastWeights) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's input, with that at the few tokens before; what there is to write; and what `_context` keeps."""
        assert state.context is not None
        heads, reverse, values = self.shape.heads, self.addresses.num_reversed, tokens.values.float()
        if self.config.shared_values:
            values = values.transpose(1, 2).flatten(2)[:, None]  # one, for all heads
        new, kept = values.shape[2], tokens.hidden.float()
        if reverse:
            kept = torch.cat([kept, values[:, :reverse].transpose(1, 2).flatten(2)], dim=-1)
        kept = torch.cat([state.context, kept], dim=1)
        hidden = kept[..., : self.shape.hidden]
        values = values.expand(-1, heads, -1, -1)
        if reverse:  # what stood before a token is stored under it
            before = kept[:, -new - 1 : -1, self.shape.hidden :].unflatten(-1, (-1, self.value_dim)).transpose(1, 2)
            values = torch.cat([before.expand(-1, reverse, -1, -1), values[:, reverse:]], dim=1)
        if self.adapters is not None:
            values = values + self.adapters.values(hidden)[:, :, -new:]
        if self.config.rule == "source":
            values = functional.normalize(values, dim=-1)  # bounds the state so that the clamp never acts: README.md
        return hidden, values, kept

    def _read(self, tokens, initial_state, snapshot_segment, read, anchor, log):  # noqa: ANN001, ANN202
        config = self.config
        new = tokens.hidden.shape[1]
        hidden, values, kept = self._given(tokens, initial_state)
        keys, queries = (x[:, :, -new:] for x in self.addresses(hidden, read=read))
        gate = _Gate(self, tokens, hidden, values)
        values = gate.news(values, keys)
        rule, start = self.rule(), initial_state.matrices
        if anchor is not None:
            out, final = step_by_step(rule, keys, queries, values, gate, start, anchor.matrices)
            snapshot, write = final, torch.zeros_like(gate.modulated)
            surprises = torch.cat(gate.surprises, dim=2) if gate.surprises else write
        else:
            result = scan(
                rule, keys, queries, values, gate, start, tokens.segment_tokens, config.chunk_size,
                snapshot_segment=snapshot_segment, read=read,
            )  # fmt: skip
            out, write, surprises, final, snapshot = result
        read_to = tokens.valid.sum(1)
        final = final._replace(context=self._context(kept, read_to))
        if snapshot_segment is None:
            snapshot = final
        else:
            border = torch.minimum(snapshot_segment.clamp_min(0) * tokens.segment_tokens, read_to)
            snapshot = snapshot._replace(context=self._context(kept, border))
        added = None
        if out is not None:
            asked = hard_gate(self.read_gate(hidden)[:, :, -new:], config.dead_zone, config.saturation)
            if rule.hebbian and config.write_strength:  # what it holds is in units of the write strength
                out = out / config.write_strength
            if self.slow is not None:
                out = out + self.slow(queries, (asked > 0).any(1))
            if self.adapters is not None:
                out = self.adapters.read(out)
            out = self.output_gate[:, None, None] * out
            if self.adapters is not None:
                out = out - self.adapters.attention_share[:, None, None] * tokens.attended.float()
            added = asked[..., None] * out
            if config.shared_values:
                added = added.sum(1).unflatten(-1, (-1, self.shape.value_dim)).transpose(1, 2)
        written = Written(keys, values, write, gate.ticks(write)).detach() if log else None
        return Reading(added, final, write, surprises, gate.modulated, written), snapshot

    def _context(self, kept: Tensor, read_to: Int[Tensor, " batch"]) -> Tensor:
        """The last few before token `read_to` of each row; `kept` begins with those before its first token."""
        index = read_to[:, None] + torch.arange(self.config.taps - 1, device=kept.device)
        return kept.gather(1, index[..., None].expand(-1, -1, kept.shape[-1]))


class _Gate:
    """The write gate of one pass: what the layer sees, modulated by what the controller is told."""

    def __init__(self, sidecar: Sidecar, tokens: LayerTokens, hidden: Tensor, values: Tensor) -> None:
        self.config, self.controller, self.tokens = sidecar.config, sidecar.controller, tokens
        self.slow = sidecar.slow
        self.needs_surprise = self.controller is not None
        new = tokens.hidden.shape[1]
        opened = torch.ones(values.shape[:-1], device=values.device)
        self.activation = opened if sidecar.write_gate is None else sidecar.write_gate(hidden)[:, :, -new:]
        self.uncertainty = signals.uncertainty(tokens.attended, tokens.values)
        self.phase = signals.phase(tokens.positions, self.config.phase_period_tokens)
        self.surprises: list[Tensor] = []
        self._modulated: list[Tensor] = []

    def __call__(self, surprise: Tensor | None, now: slice) -> Dose:
        config, valid = self.config, self.tokens.valid[:, None, now]
        gate, scale = self.activation[:, :, now], 1.0
        if self.controller is not None:
            assert surprise is not None
            plasticity = self.controller(
                surprise, self.uncertainty[:, :, now], self.tokens.reward[:, now], self.phase[:, now]
            )
            gate, scale = gate * plasticity.gate, plasticity.scale
            self.surprises.append(surprise)
        self._modulated.append(gate)
        opened = hard_gate(gate, config.dead_zone, config.saturation) if config.gate == "hard" else gate
        opened = opened * scale
        if self.tokens.forced is not None:
            opened = opened.masked_fill(self.tokens.forced[:, None, now], 1.0)
        opened = opened * valid
        if self.tokens.silent is not None:
            opened = opened * ~self.tokens.silent[:, None, now]
        ticks = opened if config.decay_per == "write" else valid.expand_as(opened).to(opened.dtype)
        return Dose(opened * config.write_strength, ticks)

    def news(self, values: Tensor, keys: Tensor) -> Tensor:
        """What of the values is not in the slow weights: what they know already does not surprise, and is not written.
        The slow weights are asked where the gate may open; the controller can only close it further."""
        if self.slow is None:
            return values
        may_open = self.activation > (self.config.dead_zone if self.config.gate == "hard" else 0.0)
        if self.tokens.forced is not None:
            may_open = may_open | self.tokens.forced[:, None]
        return values - self.slow(keys, may_open.any(1))

    def ticks(self, write: Tensor) -> Tensor:
        """How often each token of the pass decayed the state, from how strongly it was written."""
        if self.config.decay_per == "token":
            return self.tokens.valid[:, None].expand_as(write).to(write.dtype)
        return write / (self.config.write_strength or 1.0)

    @property
    def modulated(self) -> Tensor:
        """The activation after the controller, of all tokens."""
        return torch.cat(self._modulated, dim=2)


def _orthogonal(shape: LayerShape, rank: int) -> Tensor:
    """Per head, a [head_dim, rank] map with orthonormal columns."""
    return torch.linalg.qr(torch.randn(shape.heads, shape.head_dim, rank))[0].contiguous()


def _just_open(config: FastWeightsConfig, by: float) -> float:
    """The bias with which a gate, after an untrained controller, stands `by` above the dead zone."""
    activation = torch.tensor(min(config.dead_zone + by, 0.99))
    return float(torch.logit(activation))
