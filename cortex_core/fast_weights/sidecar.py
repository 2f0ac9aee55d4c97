"""One layer's memory: from the layer's input and its own values to what it adds to the attention output."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cortex_core.config import FastWeightsConfig
from cortex_core.fast_weights import signals
from cortex_core.fast_weights.address import Addresses
from cortex_core.fast_weights.chunk import delta_scan
from cortex_core.fast_weights.controller import Controller
from cortex_core.fast_weights.gate import TappedGate, hard_gate
from cortex_core.fast_weights.rules import delta_rule
from cortex_core.fast_weights.state import FastWeights


class LayerTokens(NamedTuple):
    """What one attention layer computed for its tokens, and where they stand. Shapes: `layer_shape`."""

    hidden: Float[Tensor, "batch tokens hidden"]
    values: Float[Tensor, "batch heads tokens value_dim"]
    attended: Float[Tensor, "batch heads tokens value_dim"]
    valid: Bool[Tensor, "batch tokens"]
    positions: Int[Tensor, "batch tokens"]
    reward: Float[Tensor, "batch tokens"]
    place: Int[Tensor, "batch tokens"]
    """Tokens between the start of the segment and this one."""
    before: Float[Tensor, "batch context hidden"] | None = None
    """`hidden` of the few tokens before these, where a call goes on within a segment; zeros before its start."""


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


class Sidecar(nn.Module):
    """Gated delta-rule memory of one layer. Parameters float32; adds exactly 0 until `output_gate` is trained."""

    def __init__(self, shape: LayerShape, config: FastWeightsConfig) -> None:
        super().__init__()
        self.shape, self.config = shape, config
        self.addresses = Addresses(shape.hidden, shape.heads, config.rank, config.taps)
        # Just open: a gradient everywhere, and writes too weak to overwrite one another.
        self.write_gate = TappedGate(shape.hidden, shape.heads, config.taps, bias=_just_open(config, 0.05))
        self.read_gate = TappedGate(shape.hidden, shape.heads, config.taps, bias=_just_open(config, 0.25))
        self.output_gate = nn.Parameter(torch.zeros(shape.heads))
        self.controller = Controller(config) if config.controller else None

    def empty_state(self, batch: int) -> FastWeights:
        """A memory that holds nothing."""
        s = self.shape
        return FastWeights.zeros(batch, s.heads, self.config.rank, s.value_dim, self.output_gate.device)

    def forward(
        self,
        tokens: LayerTokens,
        initial_state: FastWeights,
        *,
        snapshot_chunk: Int[Tensor, " batch"] | None = None,
        read: bool = True,
        stepwise: bool = False,
    ) -> tuple[Reading, FastWeights]:
        """Read `tokens` from `initial_state`. Returns the reading and the state at the start of `snapshot_chunk`.

        `stepwise` runs token by token from any state (generation); otherwise the first token opens a chunk. All of it
        in float32, also under autocast.
        """
        with torch.autocast(tokens.hidden.device.type, enabled=False):
            return self._read(tokens, initial_state, snapshot_chunk, read, stepwise)

    def _read(self, tokens, initial_state, snapshot_chunk, read, stepwise):  # noqa: ANN001, ANN202
        config = self.config
        new, values = tokens.hidden.shape[1], tokens.values.float()
        hidden, place = _with_context(tokens, config.taps)
        keys, queries = (x[:, :, -new:] for x in self.addresses(hidden, place, read=read))
        activation = self.write_gate(hidden, place)[:, :, -new:]
        uncertainty = signals.uncertainty(tokens.attended.float(), values)
        phase = signals.phase(tokens.positions, config.phase_period_tokens)
        modulated: list[Tensor] = []
        surprises: list[Tensor] = []

        def write_gate(surprise: Tensor, now: slice) -> Tensor:
            gate, scale = activation[:, :, now], 1.0
            if self.controller is not None:
                plasticity = self.controller(surprise, uncertainty[:, :, now], tokens.reward[:, now], phase[:, now])
                gate, scale = gate * plasticity.gate, plasticity.scale
            modulated.append(gate)
            surprises.append(surprise)
            opened = hard_gate(gate, config.dead_zone, config.saturation) * scale * config.write_strength
            return opened * tokens.valid[:, None, now]

        if stepwise:
            out, final = delta_rule(keys, queries, values, write_gate, config.decay, initial_state, config.chunk_size)
            snapshot, write = final, torch.zeros_like(activation)
        else:
            scan = delta_scan(
                keys, queries, values, write_gate, config.decay, initial_state.up, config.chunk_size,
                snapshot_chunk=snapshot_chunk, read=read,
            )  # fmt: skip
            out, write = scan.outputs, scan.write
            final, snapshot = FastWeights.at_chunk_start(scan.final), FastWeights.at_chunk_start(scan.snapshot)
        added = None
        if out is not None:
            opened = self.read_gate(hidden, place)[:, :, -new:]
            asked = hard_gate(opened, config.dead_zone, config.saturation)
            added = self.output_gate[:, None, None] * asked[..., None] * out
        return Reading(added, final, write, torch.cat(surprises, dim=2), torch.cat(modulated, dim=2)), snapshot


def _with_context(tokens: LayerTokens, taps: int) -> tuple[Tensor, Tensor]:
    """The layer's input with the few tokens before it, and the place of each in its segment."""
    hidden = tokens.hidden.float()
    if tokens.before is None:
        return hidden, tokens.place
    hidden = torch.cat([tokens.before.float(), hidden], dim=1)
    return hidden, torch.full(hidden.shape[:2], taps, device=hidden.device)  # zeros stand for what is not there


def _just_open(config: FastWeightsConfig, by: float) -> float:
    """The bias with which a gate, after an untrained controller, stands `by` above the dead zone."""
    activation = torch.tensor(min(config.dead_zone + by, 0.99))
    return float(torch.logit(activation))
